"""moevlm's own CPU kernels in the place of canonical nodes, in ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from bench import variants
from bench.visible_end import visible_ends
from moevlm.export.backends.cpu.passes.attention import CpuAttention
from moevlm.export.backends.cpu.passes.candidates import CpuCandidates
from moevlm.export.backends.cpu.passes.gated_delta import CpuGatedDelta
from moevlm.export.backends.cpu.passes.linear import CpuFloatLinear, CpuLinear
from moevlm.export.backends.cpu.passes.moe import CpuMoE
from moevlm.export.backends.registry import targets
from moevlm.export.backends.states import kept
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.formats.integers import IntFormat
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.gated_delta import GATED_DELTA
from moevlm.export.graph.moe_functions import EXPERTS
from moevlm.export.graph.paged_attention import INPUTS, PAGED_ATTENTION
from moevlm.export.graph.weights import Weight, weight_of
from moevlm.export.model import CanonicalModel
from moevlm.export.passes.base import run
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.plugins.ops.candidates import candidates
from moevlm.plugins.ops.spec import DOMAIN, AttentionSpec, ExpertsSpec, GatedDeltaSpec, RouterSpec, attributes
from moevlm.runtime.backends.libraries import DOMAIN as CPU
from moevlm.runtime.core.states import PagedKV, Recurrent
from tests.support.delta_variants import delta_inputs
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
    assert CpuFloatLinear().apply(model) == 1  # as run would, but that this Gemm routes nothing
    run([], model)
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


@pytest.mark.parametrize("scheme", [IntFormat(8, 32), IntFormat(4, 128)], ids=["int8-32", "int4-128"])
def test_experts_as_many_and_as_wide_as_gemma_4_s(scheme):
    """A width of 704 is five groups of 128 and a half."""
    case = Case(RouterSpec(8), ExpertsSpec("gelu_tanh"), router_scale=True, experts=128, hidden=64, inner=704)
    case.check(lowered(case, scheme), ACTIVATIONS)


@biases
def test_router_with_factors_for_experts(has_bias):
    case = Case(RouterSpec(2), router_bias=has_bias, router_scale=True, hidden=64, inner=40)
    case.check(lowered(case, IntFormat(8, 32)), ACTIVATIONS)


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


HEADS, KV_HEADS, HEAD_DIM, HIDDEN, PAGE = 4, 2, 16, 32, 16
SPEC = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, epsilon=1e-3)


def attention(has_norm: bool, images: bool = False) -> ir.Model:
    """x -> q, k, v -> PagedAttention, as a decoder layer has them."""
    x = value("x", ["T", HIDDEN])
    tables = [value(name, ["T", HEAD_DIM // 2]) for name in ("cos", "sin")]
    held = [value(f"{kind}_cache", ["pages", KV_HEADS, "page", HEAD_DIM]) for kind in ("key", "value")]
    places = [
        value(name, [size], ir.DataType.INT32) for name, size in (("query_start", "starts"), ("context_len", "N"))
    ]
    places.append(value("page_table", ["N", "M"], ir.DataType.INT32))
    widths = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    rows = {name: value(name, ["T", width]) for name, width in widths.items()}
    nodes = [gemm(x, f"w{name}", rows[name]) for name in widths]
    outputs = [value("y", ["T", widths["q"]])]
    outputs += [value(f"{kind}_cache_out", ["pages", KV_HEADS, "page", HEAD_DIM]) for kind in ("key", "value")]
    gains = [ir.Value(name=f"g{name}") for name in "qk"] if has_norm else []
    ends = [value("visible_end", ["T"], ir.DataType.INT32)] if images else []
    inputs = [*rows.values(), *tables, *held, *places, *gains]
    inputs += [*[None] * (INPUTS.index("visible_end") - len(inputs)), *ends] if images else []
    nodes.append(ir.node(PAGED_ATTENTION, inputs, attributes(SPEC), domain=DOMAIN, outputs=outputs))
    rng = np.random.default_rng(3)
    # Queries and keys of the size of x, so that float32 has the scores' weights to a millionth.
    weights = {f"w{n}": rng.standard_normal((width, HIDDEN), np.float32) / HIDDEN**0.5 for n, width in widths.items()}
    weights |= {str(gain.name): rng.standard_normal(HEAD_DIM, np.float32) for gain in gains}
    return graph(nodes, [x, *tables, *held, *places, *ends], outputs, **weights)


def outputs_of(model: ir.Model, width: int, dtype: type, steps: list[list[tuple[int, int]]]) -> list[np.ndarray]:
    """y of each step and then the caches, which start empty. steps: (tokens kept, tokens) of each sequence."""
    running, rng = session(model), np.random.default_rng(5)
    caches = {f"{kind}_cache": np.zeros((8, KV_HEADS, PAGE, width), dtype) for kind in ("key", "value")}
    results = []
    for sequences in steps:
        contexts, lengths = zip(*sequences, strict=True)
        tokens = sum(lengths)
        angle = rng.uniform(0, 6, (tokens, HEAD_DIM // 2)).astype(np.float32)
        given = {"x": rng.standard_normal((tokens, HIDDEN), np.float32), "cos": np.cos(angle), "sin": np.sin(angle)}
        given["query_start"] = np.cumsum([0, *lengths]).astype(np.int32)
        given["context_len"] = np.array(contexts, np.int32)
        given["page_table"] = np.array([[5, 2], [7, 1], [3, 4]], np.int32)[: len(sequences)]
        given["visible_end"] = visible_ends(sequences, np.random.RandomState(tokens))
        wanted = {each.name for each in running.get_inputs()}
        y, *held = running.run(None, {name: array for name, array in (given | caches).items() if name in wanted})
        caches = dict(zip(caches, held, strict=True))
        results.append(y)
    return [*results, *caches.values()]


STEPS = [[(0, 1), (0, 20), (0, 5)], [(1, 1), (20, 1), (5, 1)], [(2, 3), (21, 9), (6, 1)]]


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("has_norm", [True, False], ids=["norms", "no_norms"])
def test_attention_is_one_node_on_rows_of_q_k_and_v(has_norm, packed, images):
    model, reference = attention(has_norm, images), attention(has_norm, images)
    add_functions(reference)
    run([*([PackProjections()] if packed else []), CpuAttention()], model)
    assert sorted(ops(model)) == (
        ["Gemm", PAGED_ATTENTION] if packed else ["Concat", "Gemm", "Gemm", "Gemm", PAGED_ATTENTION]
    )
    ours, theirs = (outputs_of(form, HEAD_DIM, np.float32, STEPS) for form in (model, reference))
    for got, want in zip(ours[:3], theirs[:3], strict=True):  # how keys lie in a page is the kernel's own
        assert_close(got, want, 2e-6)


def test_int8_cache_holds_a_scale_for_each_row():
    model, reference = attention(True), attention(True)
    add_functions(reference)
    run([PackProjections(), CpuAttention("int8")], model)
    caches = [v for v in (*model.graph.inputs, *model.graph.outputs) if "_cache" in v.name]
    assert {(v.dtype, v.shape[3]) for v in caches} == {(ir.DataType.INT8, HEAD_DIM + 4)}
    ours = outputs_of(model, HEAD_DIM + 4, np.int8, STEPS)
    theirs = outputs_of(reference, HEAD_DIM, np.float32, STEPS)
    for got, want in zip(ours[:3], theirs[:3], strict=True):
        assert_close(got, want, 0.05)


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


DELTA = GatedDeltaSpec(key_heads=2, value_heads=4, key_dim=8, value_dim=16, kernel=4)


def gated_delta() -> ir.Model:
    """x -> qkv, a, b -> GatedDelta, and a gate beside it, as a decoder layer has them."""
    x, given = value("x", ["T", HIDDEN]), delta_inputs(DELTA, (1,))
    widths = {"qkv": DELTA.channels, "a": DELTA.value_heads, "b": DELTA.value_heads, "z": 64}
    rows = {name: value(name, ["T", width]) for name, width in widths.items()}
    nodes = [gemm(x, f"w{name}", rows[name]) for name in widths]
    stored = [ir.Value(name=name) for name in ("conv_weight", "rate", "dt_bias")]
    states = [value(name, ["rows", *given[name].shape[1:]]) for name in ("conv_state", "delta_state")]
    places = [value(name, [n], ir.DataType.INT32) for name, n in (("query_start", "starts"), ("state_row", "N"))]
    outputs = [value("y", ["T", 64]), *(value(f"{state.name}_out", state.shape) for state in states)]
    inputs = [rows["qkv"], rows["a"], rows["b"], *stored, *states, *places]
    nodes.append(ir.node(GATED_DELTA, inputs, attributes(DELTA), domain=DOMAIN, outputs=outputs))
    weights = {f"w{name}": matrix(width, HIDDEN) for name, width in widths.items()}
    weights |= {str(one.name): given[str(one.name)] for one in stored}
    return graph(nodes, [x, *states, *places], [*outputs, rows["z"]], **weights)


def test_gated_delta_has_a_kernel_and_gates_of_float32():
    model = gated_delta()
    passes = [PackProjections(), CpuLinear(IntFormat(8, 32)), CpuFloatLinear(), CpuGatedDelta()]
    assert run(passes, model) == {"PackProjections": 1, "CpuLinear": 1, "CpuFloatLinear": 2, "CpuGatedDelta": 1}
    assert sorted(ops(model)) == ["FloatLinear", "FloatLinear", GATED_DELTA, "Linear", "Split"]
    delta = next(node for node in model.graph if node.op_type == GATED_DELTA)
    assert [given.producer().op_type for given in delta.inputs[:3]] == ["Split", "FloatLinear", "FloatLinear"]


def test_gated_delta_keeps_the_numbers_of_its_body():
    model, reference = gated_delta(), gated_delta()
    for name, held in reference.graph.initializers.items():
        model.graph.initializers[name].const_value = held.const_value
    add_functions(reference)
    run([CpuGatedDelta()], model)
    inputs = delta_inputs(DELTA, (1, 9, 0, 4))
    given = {name: inputs[name] for name in ("conv_state", "delta_state", "query_start", "state_row")}
    given["x"] = matrix(14, HIDDEN)
    for got, want in zip(*(session(form).run(None, given) for form in (model, reference)), strict=True):
        assert_close(got, want, 5e-6)


def test_router_and_gate_of_a_shared_expert_stay_float32(saved: dict[str, Path]):
    with Checkpoint.open(saved["qwen3_5_moe"]) as checkpoint:
        model = CanonicalModel.of(checkpoint)
        (target,) = targets(["cpu:int4"], {})
        lowered = target.lower(model.graphs["decoder"], "decoder")
    exact = [node.inputs[1].name.removesuffix(".panels") for node in lowered.graph if node.op_type == "FloatLinear"]
    moe = [f"layers.{i}.feed_forward.{part}.weight" for i in (0, 1) for part in ("router", "shared_gate")]
    assert set(exact) == {*moe, "layers.0.attention.a.weight", "layers.0.attention.b.weight"}
    assert not any(node.op_type == "Gemm" for node in lowered.graph)


@pytest.mark.parametrize(("asked", "latents"), [("auto", "float32"), ("int8", "int8"), ("float32", "float32")])
def test_latents_stay_float32_unless_int8_is_asked_for(asked: str, latents: str) -> None:
    states = (
        PagedKV(layer=0, kv_heads=2, key_dim=16, value_dim=16),
        PagedKV(layer=1, kv_heads=1, key_dim=48, value_dim=32, value_in_key=True),
        Recurrent(layer=2, name="conv", shape=(3, 8)),
    )
    heads = "int8" if asked == "auto" else asked
    assert [state.dtype for state in kept(states, asked)] == [heads, latents, "float32"]
