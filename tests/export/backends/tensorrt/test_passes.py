"""The graphs that TensorRT is given, held to the canonical ones."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from bench.variants import BLOCKS, MODELS
from moevlm.export.backends.tensorrt.passes.native_moe import NativeMoE
from moevlm.export.backends.tensorrt.passes.plugin import DOMAIN
from moevlm.export.backends.tensorrt.passes.plugin_attention import PluginPagedAttention, PluginSegmentAttention
from moevlm.export.backends.tensorrt.passes.plugin_candidates import PluginCandidates
from moevlm.export.backends.tensorrt.passes.plugin_moe import PluginMoE, expert_weights
from moevlm.export.backends.tensorrt.passes.typed import Typed
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.moe_functions import EXPERTS
from moevlm.export.graph.op import is_op
from moevlm.export.graph.paged_attention import PAGED_ATTENTION
from moevlm.export.graph.segment_attention import SEGMENT_ATTENTION
from moevlm.export.model import CanonicalModel
from moevlm.export.passes.base import run
from moevlm.export.passes.lower_head_linear import LowerHeadLinear
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.ops.candidates import candidates
from moevlm.plugins.ops.spec import AttentionSpec, ExpertsSpec
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS
from tests.support.checkpoints import ATTENDING
from tests.support.hybrid import save
from tests.support.moe_cases import Case
from tests.support.plan_graphs import (
    STEPS,
    canonical_outputs,
    error,
    evaluate,
    in_question,
    random_images,
    random_step,
    usual_error,
    with_stored_experts,
)
from tests.support.plugin_nodes import named
from tests.support.tiny import TinyCheckpoint

MANY = ((0, 8), (70, 1), (60, 9), (3, 6))  # rows enough for a median
# Activations are rounded after every operator: 2**-9 and 2**-12 of a value, and a few dozen of them add up.
TOLERANCE = {"bfloat16": 0.03, "float16": 0.004}
# Random weights are the hardest to quantize: 4 bits leave 8 % of a weight's size as error.
WEIGHTS = {"": 0.0, "int8": 0.006, "fp8": 0.04, "int4": 0.1}
CACHES = {"int8": 0.02, "fp8": 0.06}


def attention(dtype: str, cache: str = "") -> tuple[object, ...]:
    return PluginPagedAttention(dtype, cache, named), PluginSegmentAttention(dtype, named)


Graphs = dict[str, ir.Model]


def canonical_graphs(model_type: str, folder: Path) -> Iterator[Graphs]:
    with Checkpoint.open(TinyCheckpoint(model_type=model_type).save(folder / "checkpoint")) as source:
        made = CanonicalModel.of(source).graphs
        for graph in made.values():
            add_functions(graph)
        yield made


@pytest.fixture(scope="module", params=(*ATTENDING, "gemma4"))
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graphs]:
    yield from canonical_graphs(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=ATTENDING)
def silu_graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graphs]:
    """Of models whose experts TensorRT's own layer computes."""
    yield from canonical_graphs(request.param, tmp_path_factory.mktemp(request.param))


def lowered(graph: ir.Model, *passes: object) -> ir.Model:
    model = graph.clone()
    run(passes, model)  # type: ignore[arg-type]
    assert not model.functions
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_decoder_in_the_dtype_of_the_gpu_equals_the_canonical_one(graphs: Graphs, dtype: str, weights: str) -> None:
    canonical = graphs["decoder"]
    packed = PackProjections(PAGED_ATTENTION, SEGMENT_ATTENTION)
    model = lowered(canonical, packed, Typed(dtype), *attention(dtype), PluginMoE(dtype, weights, 32, named))
    feeds = random_step(canonical, MANY, np.random.default_rng(0))
    stored = with_stored_experts(canonical, model)
    want, got = canonical_outputs(stored, feeds), evaluate(model, feeds)
    assert got.keys() == want.keys()
    for name in want:
        ours, theirs = (in_question(name, outputs[name], feeds) for outputs in (got, want))
        assert usual_error(ours, theirs) < TOLERANCE[dtype], name
    for node in stored.graph:
        for value in node.inputs[3:] if is_op(node, EXPERTS) else ():
            rounded, exact = (graph.graph.initializers[value.name].const_value.numpy() for graph in (stored, canonical))
            assert error(rounded, exact) < TOLERANCE[dtype] + WEIGHTS[weights], value.name
    given = {str(value.name): value.dtype for value in model.graph.inputs}
    kept = [name for name in given if "_cache." in name or name in ("visual_embeds", "deepstack_embeds")]
    assert {given[name] for name in kept} == {ir.DataType[dtype.upper()]}
    assert [value.name for value in model.graph.outputs] == ["logits"]


@pytest.mark.parametrize("step", STEPS)
def test_decoder_with_float32_everywhere_is_the_canonical_one(graphs: Graphs, step: str) -> None:
    canonical = graphs["decoder"]
    moe = PluginMoE("float32", "", 32, named)
    model = lowered(canonical, *attention("float32"), moe, PluginCandidates(named))
    feeds = random_step(canonical, STEPS[step], np.random.default_rng(0))
    want, got = canonical_outputs(canonical, feeds), evaluate(model, feeds)
    for name in want:
        assert error(got[name], want[name]) < 1e-5, name
    found = [got[name] for name in CANDIDATE_OUTPUTS]
    for ours, theirs in zip(found, candidates(got["logits"], 256), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("cache", CACHES)
def test_quantized_caches_cost_their_rounding(graphs: Graphs, cache: str) -> None:
    canonical = graphs["decoder"]
    model = lowered(canonical, *attention("float32", cache), PluginMoE("float32", "", 32, named))
    kept = [value for value in model.graph.inputs if "_cache." in str(value.name)]
    shapes = {v.name: v.shape for v in canonical.graph.inputs}
    assert {value.dtype for value in kept} == {ir.DataType.INT8}
    assert all(value.shape[3] == shapes[value.name][3] + 4 for value in kept)  # type: ignore[index]
    feeds = random_step(canonical, MANY, np.random.default_rng(0))
    want, got = canonical_outputs(canonical, feeds), evaluate(model, feeds, cache)
    for name in want:
        cost = usual_error(*(in_question(name, outputs[name], feeds) for outputs in (got, want)))
        assert 1e-4 < cost < CACHES[cache], name


def hybrid(path: Path, *layers: str) -> ir.Model:
    with Checkpoint.open(save(path, layers)) as source:
        graph = CanonicalModel.of(source).graphs["decoder"]
        add_functions(graph)
        return graph.clone()


@pytest.mark.usefixtures("hybrid_family")
@pytest.mark.parametrize("last", ["parallel", "images", "scaled", "latent"])
def test_layers_of_every_kind_of_attention(tmp_path: Path, last: str) -> None:
    canonical = hybrid(tmp_path / "checkpoint", "unturned", "local", "windowed sandwich", last)
    moe = PluginMoE("float32", "", 32, named)
    model = lowered(canonical, PackProjections(PAGED_ATTENTION), LowerHeadLinear(), *attention("float32"), moe)
    # q, k and v are one product's, unless q is scaled behind its own.
    assert [node.op_type for node in model.graph if node.op_type in ("Concat", "Split")] == (
        {"scaled": ["Split", "Concat"], "latent": ["Split", "Split", "Concat", "Concat", "Concat"]}.get(last, [])
    )
    feeds = random_step(canonical, ((0, 40), (70, 1), (9, 20)), np.random.default_rng(0))
    assert ("visible_end" in feeds) == (last == "images")
    want, got = canonical_outputs(canonical, feeds), evaluate(model, feeds)
    for name in want:
        assert error(got[name], want[name]) < 1e-5, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_vision_equals_the_canonical_one(graphs: Graphs, dtype: str) -> None:
    canonical = graphs["vision"]
    typed = () if dtype == "float32" else (Typed(dtype),)
    model = lowered(canonical, *typed, *attention(dtype))
    kinds = {node.op_type for node in model.graph}
    normed = any("q_norm" in name for name in canonical.graph.initializers)  # heads are normed one by one
    assert not kinds & ({"Equal"} if normed else {"Equal", "Split"})  # no mask, and rows stay as they are
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType[dtype.upper().replace("FLOAT32", "FLOAT")]}
    feeds = random_images(canonical, (4, 8, 12), np.random.default_rng(7))
    want, got = canonical_outputs(canonical, feeds), evaluate(model, feeds)
    assert got.keys() == want.keys()
    for name in want:
        assert error(got[name], want[name]) < TOLERANCE.get(dtype, 1e-5), name


def test_what_later_tokens_left_in_the_cache_is_not_seen(graphs: Graphs) -> None:
    moe = PluginMoE("float16", "", 32, named)
    model = lowered(graphs["decoder"], Typed("float16"), *attention("float16"), moe)
    feeds = random_step(graphs["decoder"], ((4, 3), (1, 2)), np.random.default_rng(0))
    want = evaluate(model, feeds)["logits"]
    pages = feeds["page_table"][:, 0]
    for name in feeds:
        if "_cache." in name:
            feeds[name][pages[0], :, 7:], feeds[name][pages[1], :, 3:], feeds[name][0] = 99.0, -99.0, 9.0
    np.testing.assert_array_equal(evaluate(model, feeds)["logits"], want)


@pytest.mark.parametrize("exact", [True, False])
def test_only_what_decides_the_routing_and_norms_of_heads_stay_float32(graphs: Graphs, exact: bool) -> None:
    canonical, moe = graphs["decoder"], PluginMoE("float16", "", 32, named)
    model = lowered(canonical, Typed("float16", exact), *attention("float16"), moe)
    wide = [v for v in model.graph.initializers.values() if v.dtype is ir.DataType.FLOAT and len(v.shape or ())]
    assert {user.op_type for value in wide for user in value.consumers()} <= {"Gemm", "MoERouter", "PagedAttention"}
    for node in model.graph:
        if node.op_type == "Gemm":
            routes = any(user.op_type == "MoERouter" for user in node.outputs[0].consumers())
            assert (node.inputs[1].dtype is ir.DataType.FLOAT) == (routes and exact)  # type: ignore[union-attr]
    feeds = random_step(canonical, MANY, np.random.default_rng(0))
    got, want = evaluate(model, feeds)["logits"], canonical_outputs(canonical, feeds)["logits"]
    assert usual_error(got, want) < TOLERANCE["float16"]


def test_weights_beyond_float16_are_named(graphs: Graphs) -> None:
    model = graphs["vision"].clone()
    value = next(v for v in model.graph.initializers.values() if v.name == "patch_embedding.weight")
    value.const_value = ir.tensor(np.full(value.shape.numpy(), 1e5, np.float32))  # type: ignore[union-attr]
    Typed("float16").apply(model)
    with pytest.raises(BuildError, match=r"patch_embedding.weight.*: float16 has no numbers beyond 65504"):
        model.graph.initializers["patch_embedding.weight.float16"].const_value.numpy()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", ["", "int4"])
def test_plugins_compute_every_router(name: str, weights: str) -> None:
    _check_block(Case(MODELS[name], router_bias=name.startswith(("glm", "deepseek_v3")), hidden=20, inner=12), weights)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("weights", ["", "fp8"])
def test_plugins_compute_every_kind_of_experts(name: str, weights: str) -> None:
    _check_block(Case(MODELS["qwen3_vl_moe"], BLOCKS[name], expert_biases=True, hidden=20, inner=12), weights)


def with_sizes(case: Case) -> ir.Model:
    """The block as a traced model has it: only the number of tokens is open."""
    model = case.model()
    sizes = {"E": case.experts, "H": case.hidden, "k": case.router.top_k}
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        assert value.shape is not None
        value.shape = ir.Shape([sizes.get(str(size.value), "T") for size in value.shape])
    return model


def _check_block(case: Case, weights: str) -> None:
    """The weights lie outside of the graph, and are all that it gets beside its inputs."""
    model = lowered(with_sizes(case), PluginMoE("float32", weights, 32, named))
    assert {node.domain for node in model.graph} == {DOMAIN}
    assert all(value.shape.is_static() for value in model.graph.inputs[2:])  # type: ignore[union-attr]
    assert [v.name for v in model.graph.inputs[2:]] == [*expert_weights(model)]
    for tokens in (1, 7):
        inputs = case.inputs(tokens)
        assert error(evaluate(model, inputs)["y"], case.want(inputs)) < 1e-6 + 2 * WEIGHTS[weights]


def test_native_moe_equals_the_canonical_one(silu_graphs: Graphs) -> None:
    canonical = silu_graphs["decoder"]
    moe = NativeMoE(), PluginMoE("float16", "", 32, named)
    model = lowered(canonical, Typed("float16"), *attention("float16"), *moe)
    assert not expert_weights(model)
    feeds = random_step(canonical, MANY, np.random.default_rng(0))
    want, got = canonical_outputs(canonical, feeds), evaluate(model, feeds)
    for name in want:
        ours, theirs = (in_question(name, outputs[name], feeds) for outputs in (got, want))
        assert usual_error(ours, theirs) < TOLERANCE["float16"], name


def test_native_moe_with_biases() -> None:
    case = Case(MODELS["qwen3_vl_moe"], expert_biases=True, router_scale=True)
    model = lowered(with_sizes(case), NativeMoE(), PluginMoE("float32", "", 32, named))
    inputs = case.inputs(5)
    assert error(evaluate(model, inputs)["y"], case.want(inputs)) < 1e-6


def test_native_moe_refuses_what_it_does_not_compute() -> None:
    case = Case(MODELS["qwen3_vl_moe"], ExpertsSpec("gelu_tanh"))
    with pytest.raises(BuildError, match=r"layers.0.moe: activation = gelu_tanh, .*\(allowed: silu, gated"):
        NativeMoE().apply(case.model())


def test_ops_are_those_of_the_nodes(silu_graphs: Graphs) -> None:
    ops: list[object] = []

    def program(op: object) -> bytes:
        ops.append(op)
        return b"x"

    moe = PluginMoE("bfloat16", "int4", 128, program)
    lowered(silu_graphs["decoder"], Typed("bfloat16"), PluginPagedAttention("bfloat16", "fp8", program), moe)
    assert {op for op in ops if isinstance(op, ExpertsOp)} == {
        ExpertsOp(ExpertsSpec(), 8, 2, 32, 24, "bfloat16", "int4", 128)
    }
    (paged,) = {op for op in ops if isinstance(op, PagedAttentionOp)}
    assert (paged.key_dim, paged.value_dim, paged.dtype, paged.cache, paged.page_size) == (
        16,
        16,
        "bfloat16",
        "fp8",
        64,
    )
    assert isinstance(paged.spec, AttentionSpec) and not paged.has_sinks
