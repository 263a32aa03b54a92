"""Codes of quantized checkpoints in engines: kept bit for bit where a target holds their format, else rounded anew."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from moevlm.export.backends.registry import targets
from moevlm.export.backends.tensorrt.expert_formats import expert_form
from moevlm.export.backends.tensorrt.experts_file import shared_errors
from moevlm.export.backends.tensorrt.passes.plugin_moe import PluginMoE, expert_weights
from moevlm.export.backends.tensorrt.passes.typed import Typed
from moevlm.export.build import build, traced
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.dry_run import dry_run
from moevlm.export.formats.cpu_packing import PackedExperts, PackedRows, interleave, unpack, unpack_zeros
from moevlm.export.formats.float4 import Float4Format
from moevlm.export.formats.gpu_packing import unpack as unpack_gpu
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.registry import weight_format
from moevlm.export.formats.stored import (
    EncodedFrom,
    Narrowed,
    keeping,
    kept_form,
    own_codes,
    recoded,
    weight_errors,
)
from moevlm.export.graph.codes import Coded, CodeForm, Codes
from moevlm.export.graph.moved_codes import coded
from moevlm.export.graph.weights import Constant, Stack, Weight, read
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.run import check_parity
from moevlm.export.passes.base import run
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.dtypes import E4M3
from moevlm.runtime.core.engine_metadata import EngineMetadata, TensorRTMetadata
from tests.support.command_line import call
from tests.support.published import FORMATS, floats, projections

INT4 = ("int4-32", "gptq-128", "awq-32", "gptq-32-zeros", "int4-128-zeros")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return floats("qwen3_vl_moe", tmp_path_factory.mktemp("floats") / "checkpoint")


@pytest.fixture
def graph_of(original: Path, tmp_path: Path):
    def make(name: str, chosen=projections) -> ir.Model:
        quantized = FORMATS[name].publish(original, tmp_path / name / "q", tmp_path / name / "plain", chosen)
        with Checkpoint.open(quantized) as source:
            return traced(CanonicalModel.of(source), lambda *_: None)["decoder"]

    return make


def lowered(graph: ir.Model, target: str) -> dict[str, PackedRows | PackedExperts]:
    (found,) = targets([target], {})
    values = found.lower(graph, "decoder").graph.initializers.values()
    recipes = {str(value.name): getattr(value.const_value, "weight", None) for value in values}
    return {name: recipe for name, recipe in recipes.items() if isinstance(recipe, PackedRows | PackedExperts)}


def unpacked(recipe: PackedRows | PackedExperts) -> np.ndarray:
    """The values of a weight from the bytes in an engine's file."""
    form, (*_, rows, width) = recipe.scheme, recipe.source.shape
    packed = read(recipe)
    if isinstance(recipe, PackedRows):
        return _decoded(packed, rows, width, form)
    order = interleave(np.arange(rows)[:, None])[:, 0] if recipe.interleaved else np.arange(rows)
    found = []
    for expert in packed:
        panels = expert.reshape(-(-len(order) // 32), -1)
        back = np.empty((rows, width), np.float32)
        back[order] = _decoded(panels, len(order), width, form)
        found.append(back)
    return np.stack(found)


def _decoded(packed: np.ndarray, rows: int, width: int, form: IntFormat) -> np.ndarray:
    sizes = rows, width, form.bits, form.group_size
    q, scales = unpack(packed, *sizes)
    filled = np.pad(q, ((0, 0), (0, -width % form.group_size))).reshape(rows, -1, form.group_size)
    return form.decode(filled, scales, unpack_zeros(packed, *sizes) if form.zeros else None)[:, :width]


@pytest.mark.parametrize("name", ["gptq-128", "awq-32"])
def test_build_says_what_became_of_codes(name: str, original: Path, tmp_path: Path) -> None:
    quantized = FORMATS[name].publish(original, tmp_path / "q", tmp_path / "plain")
    notes: list[str] = []
    built = build(quantized, tmp_path / "b", ["cpu:int8", "ort-cpu:int8", "ort-cpu"], note=notes.append)
    kept, blocks, decoded = (engine.recoded for engine in built.manifest.engines.values())
    assert kept.keys() == blocks.keys() == {"int4 kept"}
    assert decoded.keys() == {"int4 to float32" if name == "gptq-128" else "int4 with zeros to float32"}
    assert f"cpu:int8, weights made of tensors in codes: {kept['int4 kept']} int4 kept" in notes
    assert check_parity(built.directory, quantized, ["cpu:int8", "ort-cpu:int8"], quick=True).passed
    planned = dry_run(quantized, ["cpu:int8"]).targets[0].engine
    assert planned is not None
    assert planned.recoded == kept


@pytest.mark.parametrize("target", ["cpu:int8", "cpu:int4"])
@pytest.mark.parametrize("name", INT4)
def test_integers_lie_in_the_engine_as_in_the_checkpoint(name: str, target: str, graph_of) -> None:
    recipes = lowered(graph_of(name), target)
    kept = {n: recipe for n, recipe in recipes.items() if recipe.encoding.own}
    assert {n.removesuffix(f".int{recipes[n].scheme.bits}") for n in recipes.keys() - kept.keys()} == {"head"}
    assert len([n for n in kept if "feed_forward" in n]) >= 4
    for recipe in kept.values():
        assert recipe.scheme.bits == 4
        np.testing.assert_array_equal(unpacked(recipe), read(recipe.source))


def test_weights_in_other_codes_are_not_joined(graph_of) -> None:
    graph = graph_of("int4-32", lambda name: projections(name) and "k_proj" not in name)
    recipes = lowered(graph, "cpu:int8")
    (joined,) = (recipe for n, recipe in recipes.items() if "layers.0.attention.q" in n)
    (alone,) = (recipe for n, recipe in recipes.items() if "layers.0.attention.k" in n)
    assert joined.encoding.own
    assert joined.source.shape[0] > alone.source.shape[0]
    assert not alone.encoding.own
    assert alone.scheme.bits == 8


@pytest.mark.parametrize("name", ["int8-128-zeros", "gptq-act-order", "fp8-blocks"])
def test_what_the_integers_of_a_cpu_cannot_hold_is_rounded_anew(name: str, graph_of) -> None:
    recipes = lowered(graph_of(name), "cpu:int8")
    assert not any(recipe.encoding.own for recipe in recipes.values())
    for recipe in recipes.values():
        exact = read(recipe.source)
        assert np.abs(unpacked(recipe) - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("target", ["cpu:int8", "cpu:int4"])
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-compressed", "mxfp4-compressed"])
def test_e2m1_numbers_lie_in_the_engine_as_in_the_checkpoint(name: str, target: str, graph_of) -> None:
    recipes = lowered(graph_of(name), target)
    kept = {n: recipe for n, recipe in recipes.items() if n.endswith(".fp4")}
    assert {n.rpartition(".")[0] for n in recipes.keys() - kept.keys()} == {"head"}
    for recipe in kept.values():
        assert (recipe.encoding.own, recipe.scheme.bits) == (True, 4)
        exact, digits = read(recipe.source), 0.0 if name.startswith("mx") else 2**-11  # of scales in float16
        np.testing.assert_allclose(unpacked(recipe), exact, rtol=digits, atol=0)
    assert recoded(kept.values()) == {"fp4 kept": len(kept)}
    assert (weight_errors(kept.values()) == {}) == name.startswith("mx")


def test_experts_of_which_one_matrix_alone_is_in_e2m1_are_rounded_anew(graph_of) -> None:
    graph = graph_of("mxfp4-compressed", lambda name: projections(name) and "down_proj" not in name)
    recipes = lowered(graph, "cpu:int4")
    experts = [recipe for n, recipe in recipes.items() if "feed_forward" in n]
    assert {type(recipe.scheme) for recipe in experts} == {IntFormat}
    assert not any(recipe.encoding.own for recipe in experts)


def test_eight_bits_hold_e2m1_numbers() -> None:
    weight = _Held(CodeForm("fp4", 32, scales="bfloat16"), 80)
    for form in (weight_format("int8", 16), weight_format("int8", 32), weight_format("fp8", 32)):
        found = EncodedFrom(weight, form).rows(0, 4)
        np.testing.assert_array_equal(form.decode(found.codes, found.scales)[:, :80], read(weight))
    assert own_codes(weight, weight_format("int4", 32)) is None
    assert own_codes(weight, weight_format("int8", 128)) is None
    assert recoded([PackedRows(weight, IntFormat(8, 32))]) == {"fp4 kept as int8": 1}


def test_float4_format_rounds_to_the_nearest_number() -> None:
    form, rows = Float4Format(16), np.random.RandomState(1).standard_normal((5, 40)).astype(np.float32)
    codes, scales = form.encode(rows)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = np.concatenate([numbers, -numbers])
    units = np.pad(rows, ((0, 0), (0, 8))).reshape(5, 3, 16) / scales[..., None]
    nearest = np.abs(units[..., None] - numbers).min(-1)
    np.testing.assert_allclose(np.abs(units - numbers[codes]), nearest, atol=1e-6)
    decoded = form.decode(codes, scales).reshape(5, 3, 16)
    np.testing.assert_allclose(decoded, numbers[codes] * scales[..., None], rtol=1e-6)


def test_scales_of_float4_in_two_levels() -> None:
    """Each is a number of e4m3 times its row's, and what is stored is what `encode` rounds to."""
    rows = np.random.RandomState(2).standard_normal((6, 72)).astype(np.float32) * np.float32(0.01)
    rows[1] = 0
    form = Float4Format(16, E4M3)
    codes, scales = form.encode(rows)
    of_groups, of_rows = form.levels(rows)
    assert of_groups.dtype == np.uint8 and of_rows.dtype == np.float32
    numbers = of_groups.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(scales, numbers * of_rows[:, None])
    assert (numbers.max(1) == np.where(np.arange(6) == 1, 0, 448)).all()
    np.testing.assert_allclose(scales, np.abs(np.pad(rows, ((0, 0), (0, 8))).reshape(6, 5, 16)).max(-1) / 6, rtol=2**-4)
    decoded = form.decode(codes, scales)[:, :72]
    assert np.linalg.norm(decoded - rows) < 0.13 * np.linalg.norm(rows)


def test_an_expert_s_rows_cost_no_look_at_the_others() -> None:
    """A model of 384 experts is read one expert at a time."""
    looks: list[Coded] = []

    class Expert(_Held):
        @property
        def form(self) -> CodeForm:
            looks.append(self)
            return super().form

    experts = Stack([Expert(CodeForm("int4", 32), 64) for _ in range(32)])
    encoding = EncodedFrom(experts, IntFormat(4, 32))
    assert encoding.own
    before = len(looks)
    for i in range(32):
        encoding.rows(i, i + 1)
    assert len(looks) - before <= 4 * 32


def relative_error(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of what was stored against what is exact: root mean square over root mean square."""
    errors, exact = zip(*((np.sum((a - b) ** 2.0), np.sum(a**2.0)) for a, b in pairs), strict=True)
    return float(np.sqrt(sum(errors) / sum(exact)))


@pytest.mark.parametrize(
    ("name", "target", "fate"),
    [
        ("fp8-blocks", "cpu:int4", "fp8 to int4"),
        ("gptq-act-order", "cpu:int8", "int4 in scattered groups to int8"),
        ("int8-128-zeros", "cpu:int4", "int8 with zeros to int4"),
    ],
)
def test_what_rounding_costs_is_measured_while_weights_are_written(name: str, target: str, fate: str, graph_of) -> None:
    recipes = list(lowered(graph_of(name), target).values())
    assert fate in recoded(recipes)
    assert weight_errors(recipes) == {}  # nothing was written
    stored = [unpacked(recipe) for recipe in recipes]
    of_codes = [i for i, recipe in enumerate(recipes) if recipe.encoding.kinds]
    found = weight_errors(recipes)
    assert found.keys() == {fate}
    want = relative_error((read(recipes[i].source), stored[i]) for i in of_codes)
    assert found[fate] == pytest.approx(want, rel=1e-4)
    assert 1e-4 < want < 0.15


def test_codes_that_are_kept_cost_nothing_but_the_rounding_of_scales(graph_of) -> None:
    exact = list(lowered(graph_of("awq-32"), "cpu:int4").values())
    for recipe in exact:
        read(recipe)
    assert weight_errors(exact) == {}
    weight = _Held(CodeForm("int4", 32, scales="float32"), 64, scale=1 / 3)
    rounded = PackedRows(weight, IntFormat(4, 32))
    stored = unpacked(rounded)
    found = weight_errors([rounded])
    assert found == {"int4 kept": pytest.approx(relative_error([(read(weight), stored)]), rel=1e-4)}
    assert 1e-5 < found["int4 kept"] < 2**-11


@pytest.mark.parametrize(("scale", "lost"), [(2.0**-20, 0.0), (2.0**-30, 1.0)], ids=["held", "becomes 0"])
def test_a_scale_below_float16_is_measured_though_codes_are_kept(scale: float, lost: float) -> None:
    kept = PackedRows(_Held(CodeForm("int4", 32, scales="bfloat16"), 64, scale=scale), IntFormat(4, 32))
    read(kept)
    assert weight_errors([kept]).get("int4 kept", 0.0) == lost


def test_a_cast_of_codes_is_measured_and_another_is_none(graph_of) -> None:
    graph = graph_of("fp8-blocks")
    run((Typed("bfloat16"),), graph)
    typed = [v.const_value.weight for v in graph.graph.initializers.values() if v.dtype == ir.DataType.BFLOAT16]
    narrow = [weight for weight in typed if isinstance(weight, Narrowed)]
    assert 0 < len(narrow) < len(typed)
    exact, stored = read(narrow[0].source), read(narrow[0]).astype(np.float32)
    assert weight_errors(typed) == {"fp8 to bfloat16": pytest.approx(relative_error([(exact, stored)]), rel=1e-4)}
    error = weight_errors(typed)["fp8 to bfloat16"]
    assert 0 < error < 2**-8


def test_command_and_inspect_say_what_rounding_costs(original: Path, tmp_path: Path) -> None:
    quantized = FORMATS["fp8-blocks"].publish(original, tmp_path / "q", tmp_path / "plain")
    done = call("build", quantized, "-o", tmp_path / "b", "--target", "cpu:int8")
    (error,) = Bundle.open(tmp_path / "b").manifest.engines["cpu:int8"].weight_errors.values()
    told = f"8 fp8 to int8 (weight error {100 * error:.2g} %)"
    assert told in done.out
    assert "experts that change places, parity says" in done.out
    assert told in call("inspect", tmp_path / "b").out
    added = call("build", tmp_path / "b", "--checkpoint", quantized, "--target", "cpu:int4")
    assert "cpu:int4, weights made of tensors in codes: 8 fp8 to int4 (weight error" in added.out


def test_engines_that_share_experts_share_what_these_cost() -> None:
    def engine(experts: str, **errors: float) -> EngineMetadata:
        built = TensorRTMetadata("", "", (89,), "bfloat16", experts, 1, 1, 1, 1, 1, 1)
        told = {fate.replace("_", " "): error for fate, error in errors.items()}
        return EngineMetadata("", "", "int4", (), recoded={"fp8 to int4": 2}, weight_errors=told, tensorrt=built)

    first, second = engine("experts/a", fp8_to_int4=0.08), engine("experts/a")
    found = shared_errors("experts/a", [engine("experts/b", fp8_to_int4=0.5), first, second])
    assert found == {"fp8 to int4": 0.08}
    assert shared_errors("experts/c", [first]) == {}


@pytest.mark.parametrize(
    ("name", "weights", "group_size", "dtype"),
    [
        ("int4-32", "int4", 32, "bfloat16"),
        ("int4-32", "int4", 32, "float16"),
        ("int4-128-zeros", "int4", 128, "bfloat16"),
        ("int4-32-zeros-fused", "int4", 32, "float16"),
        ("gptq-128", "int4", 32, "float16"),
        ("gptq-128", "int4", 128, "bfloat16"),
        ("gptq-32-zeros", "int4", 32, "float16"),
        ("gptq-v2-zeros", "int4", 32, "bfloat16"),
        ("awq-32", "int4", 32, "bfloat16"),
        ("awq-128", "int4", 128, "float16"),
        ("fp8-blocks", "fp8", 128, "bfloat16"),
        ("fp8-blocks-float32-scales", "fp8", 128, "bfloat16"),
        ("fp8-blocks-float32-scales", "fp8", 128, "float16"),
        ("fp8-modelopt", "fp8", 128, "bfloat16"),
        ("mxfp8", "fp8", 32, "float16"),
        ("mxfp4-compressed", "fp4", 32, "bfloat16"),
        ("mxfp4-compressed", "fp8", 32, "float16"),
        ("mxfp4-compressed-fused", "int8", 32, "float16"),
        ("fp8-blocks-fused-transposed", "fp8", 128, "bfloat16"),
        ("fp8-channels", "fp8", 128, "bfloat16"),
        ("fp8-static-fused", "fp8", 32, "bfloat16"),
        ("nvfp4", "fp4", 16, "bfloat16"),
        ("nvfp4-fused", "fp4", 16, "float16"),
        ("nvfp4-compressed", "fp4", 16, "bfloat16"),
    ],
)
def test_experts_on_a_gpu_have_the_codes_of_the_checkpoint(
    name: str, weights: str, group_size: int, dtype: str, graph_of
) -> None:
    graph = graph_of(name)
    exact = {n: read(v.const_value.weight) for n, v in graph.graph.initializers.items() if "feed_forward" in n}
    run((Typed(dtype), PluginMoE(dtype, weights, group_size, lambda _: b"")), graph)
    form, stored = expert_form(weights, group_size), expert_weights(graph)
    assert any(n.endswith("_zero") for n in stored) == ("zeros" in name or "awq" in name)
    assert sum(n.endswith("_scale") for n in stored) >= 4
    for scale in (n for n in stored if n.endswith("_scale") and not n.endswith("_row_scale")):
        part = scale.removesuffix("_scale")
        assert stored[part].encoding.own
        values, scales = read(stored[part]), read(stored[scale])
        others = [read(stored[part + end]) if part + end in stored else None for end in ("_zero", "_row_scale")]
        found = unpack_gpu(values, scales, form, exact[part].shape[-1], *others)
        digits = 2.0**-22 if name == "nvfp4-compressed" else 0.0  # of the inverse of its scale of all
        np.testing.assert_allclose(found, exact[part], rtol=digits, atol=0)


@pytest.mark.parametrize(
    ("held", "dtype", "scales"),
    [
        (["bfloat16", "bfloat16"], "bfloat16", "bfloat16"),
        (["float16", "float16"], "bfloat16", "float16"),
        (["bfloat16", "bfloat16"], "float16", "float32"),
        (["float32", "float32"], "bfloat16", "float32"),
        (["float16", "bfloat16"], "bfloat16", "float32"),
        (["float16"], "bfloat16", "float32"),  # the other is encoded anew, with scales in --dtype
        ([], "bfloat16", "bfloat16"),
    ],
)
def test_scales_keep_their_precision_where_the_dtype_of_activations_does_not_hold_it(
    held: list[str], dtype: str, scales: str
) -> None:
    weights: list[Weight] = [_Held(CodeForm("int4", 32, zeros=i == 1, scales=name), 64) for i, name in enumerate(held)]
    weights += [Constant(np.ones((4, 64), np.float32))] * (2 - len(weights))
    form = keeping(weight_format("int4", 32, dtype), *weights)
    assert form == IntFormat(4, 32, scales, zeros=len(held) == 2)
    assert keeping(weight_format("fp8", 32, dtype), *weights) == weight_format("fp8", 32, dtype)


def test_forms_that_kernels_take_and_those_that_they_do_not() -> None:
    def form(kind: str, group: int, width: int = 512, zeros: bool = False) -> IntFormat | None:
        return kept_form(_Held(CodeForm(kind, group, 1, zeros), width), IntFormat(8, 32))

    assert form("int4", 32) == IntFormat(4, 32)
    assert form("int4", 128) == IntFormat(4, 128)
    assert form("int8", 48, 480) == IntFormat(8, 48)
    assert form("int4", 512) == IntFormat(4, 32)  # one scale for a row
    assert form("int4", 512, 1024) == IntFormat(4, 32)
    assert form("int4", 8) is None
    assert form("int4", 32, zeros=True) == IntFormat(4, 32, zeros=True)
    assert form("int8", 32, zeros=True) is None
    assert form("fp8", 128) is None
    assert kept_form(Constant(np.ones((2, 64), np.float32)), IntFormat(4, 32)) is None


def test_a_row_s_one_scale_fills_groups_of_any_size() -> None:
    weight, exact = _Held(CodeForm("int4", 80), 80), Constant(np.ones((2, 64), np.float32))
    assert own_codes(weight, IntFormat(4, 32)) is not None
    found = EncodedFrom(weight, IntFormat(4, 32)).rows(1, 3)
    assert found.codes.shape == (2, 3, 32)
    assert (found.codes[:, 2, 16:] == 8).all()
    assert found.zeros is None
    np.testing.assert_array_equal(IntFormat(4, 32).decode(found.codes, found.scales)[:, :80], read(weight)[1:3])
    assert coded(weight) is weight
    assert recoded([weight, PackedRows(weight, IntFormat(4, 32)), PackedRows(weight, IntFormat(8, 32)), exact]) == {
        "int4 kept": 1,
        "int4 to float32": 1,
        "int4 to int8": 1,
    }


class _Held(Coded):
    """Four rows of codes."""

    def __init__(self, form: CodeForm, width: int, scale: float = 1 / 64) -> None:
        self._form, self._shape, self._scale = form, (4, width), np.float32(scale)

    @property
    def form(self) -> CodeForm:
        return self._form

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def codes(self, start: int, stop: int) -> Codes:
        rng = np.random.RandomState(0)
        groups, size = -(-self.shape[1] // self.form.group_size), self.form.group_size
        codes = rng.randint(0, 16, (4, groups, size)).astype(np.uint8)
        scales = rng.randint(1, 9, (4, groups)).astype(np.float32) * self._scale
        return Codes(codes[start:stop], scales[start:stop])
