"""moevlm's own CPU kernels in the place of canonical nodes, in ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import pytest

from bench import variants
from moevlm.export.backends.cpu.passes.attention import CpuAttention
from moevlm.export.backends.cpu.passes.candidates import CpuCandidates
from moevlm.export.backends.cpu.passes.linear import CpuFloatLinear, CpuLinear
from moevlm.export.backends.cpu.passes.moe import CpuMoE
from moevlm.export.formats.integers import IntFormat
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.moe_functions import EXPERTS
from moevlm.export.graph.weights import Weight, weight_of
from moevlm.export.passes.base import run
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.plugins.ops.candidates import candidates
from moevlm.plugins.ops.spec import DOMAIN, RouterSpec
from moevlm.runtime.backends.libraries import DOMAIN as CPU
from tests.support.graphs import gemm, graph, matrix, rounded
from tests.support.moe_cases import Case, assert_close, ops, session, value

# Activations are rounded to int8 per block, and scales to fp16.
ACTIVATIONS = 0.04
SCHEMES = [IntFormat(4, 32), IntFormat(8, 32), IntFormat(4, 128), IntFormat(8, 128)]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"int{s.bits}-{s.group_size}")
biases = pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])


@schemes
@biases
@pytest.mark.parametrize(("rows", "width"), [(48, 128), (33, 80), (7, 300)])
def test_projection(rows, width, has_bias, scheme):
    x, y = value("x", ["T", width]), value("y", ["T", rows])
    arrays = {"w": matrix(rows, width)} | ({"b": matrix(rows)} if has_bias else {})
    model = graph([gemm(x, "w", y, "b" if has_bias else None)], [x], [y], **arrays)
    assert run([CpuLinear(scheme)], model) == {"CpuLinear": 1}
    assert [(node.domain, node.op_type) for node in model.graph] == [(CPU, "Linear")]
    assert "w" not in model.graph.initializers
    given = matrix(9, width)
    want = given @ rounded(arrays["w"], scheme).T + arrays.get("b", np.float32(0))
    assert_close(session(model).run(None, {"x": given})[0], want, ACTIVATIONS)


@biases
@pytest.mark.parametrize(("rows", "width"), [(8, 32), (33, 80)])
def test_product_of_floats(rows, width, has_bias):
    x, y = value("x", ["T", width]), value("y", ["T", rows])
    arrays = {"w": matrix(rows, width)} | ({"b": matrix(rows)} if has_bias else {})
    model = graph([gemm(x, "w", y, "b" if has_bias else None)], [x], [y], **arrays)
    assert run([CpuFloatLinear()], model) == {"CpuFloatLinear": 1}
    assert [(node.domain, node.op_type) for node in model.graph] == [(CPU, "FloatLinear")]
    given = matrix(9, width)
    assert_close(session(model).run(None, {"x": given})[0], given @ arrays["w"].T + arrays.get("b", np.float32(0)))


def lowered(case: Case, scheme: IntFormat) -> ir.Model:
    model = case.model()
    assert run([CpuMoE(scheme)], model) == {"CpuMoE": 2}
    assert {node.domain for node in model.graph} == {CPU}
    assert not model.functions
    for name in ("gate_up", "down"):
        case.weights[name] = rounded(case.weights[name], scheme)
    return model


@schemes
@pytest.mark.parametrize("name", variants.MODELS)
def test_router_and_experts_of_every_model(name, scheme):
    case = Case(variants.MODELS[name], router_bias=name.startswith(("deepseek_v3", "glm")), hidden=128, inner=72)
    case.check(lowered(case, scheme), ACTIVATIONS)


@biases
@pytest.mark.parametrize("name", variants.BLOCKS)
def test_every_kind_of_experts(name, has_bias):
    case = Case(RouterSpec(2), variants.BLOCKS[name], expert_biases=has_bias, hidden=64, inner=40)
    case.check(lowered(case, IntFormat(8, 32)), ACTIVATIONS)


def test_weights_of_experts_that_no_token_chose_are_never_read():
    case = Case(RouterSpec(2), hidden=64, inner=32)
    inputs = case.inputs(1)
    want = case.want(inputs)
    chosen = np.argsort(-inputs["logits"][0])[:2]
    for array in case.weights.values():
        array[np.setdiff1d(np.arange(8), chosen)] = 1e4
    model = case.model()
    run([CpuMoE(IntFormat(8, 32))], model)
    assert_close(session(model).run(None, inputs)[0], want, ACTIVATIONS)


class Unread:
    """A weight that must not be read while a pass runs."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        raise AssertionError(f"read [{start}:{stop}]")


def test_packing_is_lazy():
    model = Case(RouterSpec(2), hidden=64, inner=32).model()
    for name, shape in (("gate_up", (8, 64, 64)), ("down", (8, 64, 32))):
        model.graph.initializers[name].const_value.weight = Unread(shape)
    run([CpuMoE(IntFormat(4, 32))], model)
    weights = [v for v in model.graph.node(1).inputs if v is not None and v.is_initializer()]
    assert [v.name for v in weights] == ["gate_up.int4", "down.int4"]
    recipe: Weight = weight_of(weights[0])
    with pytest.raises(AssertionError, match="read"):
        recipe.rows(0, 1)


HEADS, KV_HEADS, HEAD_DIM, HIDDEN, CAPACITY = 4, 2, 16, 32, 24


def attention(has_norm: bool) -> ir.Model:
    """x -> q, k, v -> (norms ->) CachedAttention, as a decoder layer has them."""
    x = value("x", ["T", HIDDEN])
    tables = [value(name, ["B", "S", HEAD_DIM // 2]) for name in ("cos", "sin")]
    held = [value(f"{kind}_cache", ["B", KV_HEADS, "C", HEAD_DIM]) for kind in ("key", "value")]
    position = value("cache_position", ["B"], ir.DataType.INT64)
    widths = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    nodes, rows = [], {}
    for name, width in widths.items():
        rows[name] = value(name, ["T", width])
        nodes.append(gemm(x, f"w{name}", rows[name]))
    shapes = {"cut": np.array([0, -1, HEAD_DIM]), "join": np.array([0, -1])}
    for name in "qk" if has_norm else "":
        cut, normed, joined = (ir.Value(name=f"{name}_{step}") for step in ("cut", "normed", "joined"))
        nodes += [
            ir.node("Reshape", [rows[name], ir.Value(name="cut")], outputs=[cut]),
            ir.node(
                "RMSNormalization",
                [cut, ir.Value(name=f"g{name}")],
                {"axis": -1, "epsilon": 1e-3},
                outputs=[normed],
            ),
            ir.node("Reshape", [normed, ir.Value(name="join")], outputs=[joined]),
        ]
        rows[name] = joined
    outputs = [value("y", ["T", widths["q"]])]
    outputs += [value(f"{kind}_cache_out", ["B", KV_HEADS, "C", HEAD_DIM]) for kind in ("key", "value")]
    inputs = [*rows.values(), *tables, *held, position]
    attributes = {"heads": HEADS, "kv_heads": KV_HEADS, "rotary_dim": HEAD_DIM}
    nodes.append(ir.node("CachedAttention", inputs, attributes, domain=DOMAIN, outputs=outputs))
    rng = np.random.default_rng(3)
    # Queries and keys of the size of x, so that float32 has the scores' weights to a millionth.
    weights = {f"w{n}": rng.standard_normal((width, HIDDEN), np.float32) / HIDDEN**0.5 for n, width in widths.items()}
    gains = {f"g{name}": rng.standard_normal(HEAD_DIM, np.float32) for name in "qk"} | shapes if has_norm else {}
    return graph(nodes, [x, *tables, *held, position], outputs, **weights, **gains)


def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([batch, length])
    angle = rng.uniform(0, 6, (batch, length, HEAD_DIM // 2)).astype(np.float32)
    cache = (batch, KV_HEADS, CAPACITY, HEAD_DIM)
    return {
        "x": rng.standard_normal((batch * length, HIDDEN), np.float32),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "key_cache": rng.standard_normal(cache, np.float32),
        "value_cache": rng.standard_normal(cache, np.float32),
        "cache_position": rng.integers(0, CAPACITY - length, batch),
    }


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("has_norm", [True, False], ids=["norms", "no norms"])
def test_attention_with_its_norms_is_one_node(has_norm, packed):
    model, reference = attention(has_norm), attention(has_norm)
    add_functions(reference)
    run([*([PackProjections()] if packed else []), CpuAttention()], model)
    assert sorted(ops(model)) == (
        ["CachedAttention", "Gemm"] if packed else ["CachedAttention", "Concat", "Gemm", "Gemm", "Gemm"]
    )
    ours, theirs = session(model), session(reference)
    for batch, length in ((1, 1), (3, 1), (2, 7), (1, 20)):
        given = feeds(batch, length)
        for got, want in zip(ours.run(None, given), theirs.run(None, given), strict=True):
            assert_close(got, want, 2e-6)


def test_int8_cache_holds_a_scale_behind_each_row():
    model, reference = attention(True), attention(True)
    add_functions(reference)
    run([PackProjections(), CpuAttention(int8_cache=True)], model)
    caches = [v for v in (*model.graph.inputs, *model.graph.outputs) if "_cache" in v.name]
    assert {(v.dtype, v.shape[3]) for v in caches} == {(ir.DataType.INT8, HEAD_DIM + 4)}
    given = feeds(2, 12)
    given["cache_position"][:] = 0  # the two kinds of cache start empty
    empty = {name: np.zeros((2, KV_HEADS, CAPACITY, HEAD_DIM + 4), np.int8) for name in ("key_cache", "value_cache")}
    got, key, _ = session(model).run(None, given | empty)
    want, want_key, _ = session(reference).run(None, given)
    assert_close(got, want, 0.05)
    scale = np.ascontiguousarray(key[..., HEAD_DIM:]).view(np.float32)
    assert_close((key[..., :HEAD_DIM] * scale)[:, :, :12], want_key[:, :, :12], 0.01)


def test_kernels_keep_the_names_that_taps_use():
    model = Case(RouterSpec(2), hidden=64, inner=32).model(tap=True)
    run([CpuMoE(IntFormat(8, 32))], model)
    assert [output.name for output in model.graph.outputs] == ["y", "index", "weight"]
    assert EXPERTS in ops(model)


@pytest.mark.parametrize(("vocabulary", "count"), [(7, 7), (600, 256)])
def test_candidates_follow_the_logits(vocabulary, count):
    x, logits, other = value("x", ["T", 8]), value("logits", ["L", vocabulary]), value("key_cache_out.0", ["T", 8])
    nodes = [gemm(x, "w", logits), ir.node("Identity", [x], outputs=[other])]
    model = graph(nodes, [x], [logits, other], w=matrix(vocabulary, 8))
    assert run([CpuCandidates()], model) == {"CpuCandidates": 1}
    names = ["logits", "candidate_values", "candidate_ids", "log_sum_exp", "key_cache_out.0"]
    assert [output.name for output in model.graph.outputs] == names
    got = session(model).run(None, {"x": matrix(3, 8)})
    for array, want in zip(got[1:4], candidates(got[0], count), strict=True):
        assert_close(array, want, 1e-6)
