"""Quantized kernels of ONNX Runtime in the place of float32 ones, against the same integers in float32."""

import numpy as np
import onnx_ir as ir
import pytest

from bench import variants
from moevlm.export.backends.ort.passes.lower_moe import LowerMoE
from moevlm.export.backends.ort.passes.quantize_experts import QuantizeExperts
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.stored import recoded, weights_of
from moevlm.export.graph.codes import Coded, CodeForm, Codes
from moevlm.export.graph.weights import WeightTensor
from moevlm.export.passes.base import run
from moevlm.export.passes.fuse_skip_norm import FuseSkipNorm
from moevlm.export.passes.pack_projections import PackProjections, whole
from moevlm.export.passes.quantize_embedding import QuantizeEmbedding
from moevlm.export.passes.quantize_linear import QuantizeLinear
from moevlm.plugins.ops.spec import DOMAIN, ExpertsSpec, RouterSpec, attributes
from moevlm.runtime.core.errors import BuildError
from tests.support.graphs import gemm, graph, matrix, rounded
from tests.support.moe_cases import Case, assert_close, ops, session, value

# The kernels round activations to int8 per block, in both of an expert's matrices.
ACTIVATIONS = 0.04
SCHEMES = [IntFormat(4, 32), IntFormat(8, 32), IntFormat(4, 128)]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"int{s.bits}-{s.group_size}")
rng = np.random.default_rng


def quantized_block(case: Case, scheme: IntFormat) -> ir.Model:
    model = case.model()
    assert run([LowerMoE(), QuantizeExperts(scheme)], model)["QuantizeExperts"] == 1
    for name in ("gate_up", "down"):
        case.weights[name] = rounded(case.weights[name], scheme)
    return model


ROUTERS = {
    "renormalized": RouterSpec(2),
    "softmax over all": RouterSpec(2, renormalize=False),
    "scaled": RouterSpec(2, renormalize=False, scale=2.5),
    "sigmoid": variants.MODELS["deepseek_v3"],
    "softmax after top-k": variants.MODELS["gpt_oss"],
}


@schemes
@pytest.mark.parametrize("name", ROUTERS)
def test_quantized_experts_of_every_kind_of_router(name, scheme):
    case = Case(ROUTERS[name], router_bias=name == "sigmoid", hidden=128, inner=128)
    model = quantized_block(case, scheme)
    assert "QMoE" in ops(model)
    assert "MoE" not in ops(model)
    case.check(model, ACTIVATIONS)


KERNELS = [name for name in variants.BLOCKS if not name.startswith("gelu_tanh-gated")]


@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("name", KERNELS)
def test_quantized_experts_of_every_kind(name, has_bias):
    case = Case(RouterSpec(2), variants.BLOCKS[name], expert_biases=has_bias, hidden=64, inner=32)
    case.check(quantized_block(case, IntFormat(8, 32)), ACTIVATIONS)


def test_experts_that_no_block_fits_are_refused_by_name():
    model = Case(RouterSpec(2)).model()
    LowerMoE().apply(model)
    with pytest.raises(BuildError, match=r"experts of down: their sizes are 12 and 6 \(allowed: multiples of 16\)"):
        QuantizeExperts(IntFormat(4, 32)).apply(model)


@schemes
@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("width", [128, 80])
def test_projection_is_quantized(scheme, has_bias, width):
    x, y = value("x", ["T", width]), value("y", ["T", 48])
    arrays = {"w": matrix(48, width)} | ({"b": matrix(48)} if has_bias else {})
    model = graph([gemm(x, "w", y, "b" if has_bias else None)], [x], [y], **arrays)
    assert run([QuantizeLinear(scheme)], model) == {"QuantizeLinear": 1}
    assert ops(model) == ["MatMulNBits"]
    assert "w" not in model.graph.initializers
    rows = matrix(9, width)
    want = rows @ rounded(arrays["w"], scheme).T + arrays.get("b", np.float32(0))
    assert_close(session(model).run(None, {"x": rows})[0], want, ACTIVATIONS)


class Held(Coded):
    """Integers of 4 bits as a checkpoint has them, in groups of their own."""

    def __init__(self, group: int, zeros: bool, *shape: int) -> None:
        self.shape, self.form = shape, CodeForm("int4", group, 1, zeros)
        *outer, width = shape
        groups = -(-width // group)
        self._codes = rng(1).integers(0, 16, (*outer, groups, group), np.uint8)
        self._scales = rng(2).uniform(0.5, 1.5, (*outer, groups)).astype(np.float32) * width**-0.5 / 8
        self._zeros = rng(3).integers(0, 16, (*outer, groups), np.uint8) if zeros else None

    def codes(self, start: int, stop: int) -> Codes:
        zeros = None if self._zeros is None else self._zeros[start:stop]
        return Codes(self._codes[start:stop], self._scales[start:stop], zeros)


HELD = [(16, False), (32, True), (48, False), (64, True), (128, True), (256, False)]


def hold(model: ir.Model, name: str, weight: Held) -> np.ndarray:
    """Put a checkpoint's integers in the place of an initializer's values; they as float32."""
    model.graph.initializers[name].const_value = WeightTensor(name, weight)
    return weight.rows(0, weight.shape[0])


@schemes
@pytest.mark.parametrize("width", [256, 240])
@pytest.mark.parametrize(("group", "zeros"), HELD)
def test_integers_of_a_checkpoint_stay_in_projections(group, zeros, width, scheme):
    x, y = value("x", ["T", width]), value("y", ["T", 48])
    arrays = {"w": matrix(48, width), "b": matrix(48)}
    model = graph([gemm(x, "w", y, "b")], [x], [y], **arrays)
    exact = hold(model, "w", Held(group, zeros, 48, width))
    run([QuantizeLinear(scheme)], model)
    (node,) = model.graph
    assert node.attributes["bits"].value == 4
    assert node.attributes["block_size"].value == (group & -group if group < width else scheme.group_size)
    assert recoded(weights_of(model)) == {"int4 kept": 1}
    rows = matrix(9, width)
    assert_close(session(model).run(None, {"x": rows})[0], rows @ exact.T + arrays["b"], ACTIVATIONS)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("group", "zeros"), HELD)
def test_integers_of_a_checkpoint_stay_in_experts(group, zeros, renormalize):
    case = Case(RouterSpec(2, renormalize=renormalize), hidden=192, inner=96)
    model = case.model()
    for name, array in list(case.weights.items()):
        case.weights[name] = hold(model, name, Held(group, zeros, *array.shape))
    run([LowerMoE(), QuantizeExperts(IntFormat(8, 32))], model)
    assert recoded(weights_of(model)) == {"int4 kept": 2}
    case.check(model, ACTIVATIONS)


@pytest.mark.parametrize("width", [64, 48, 33, 5])
@pytest.mark.parametrize("scheme", [IntFormat(4, 32), IntFormat(8, 32)], ids=["int4", "int8"])
def test_embedding_is_quantized_and_keeps_its_width(scheme, width):
    ids, y = value("ids", ["T"], ir.DataType.INT64), value("y", ["T", width])
    table = matrix(20, width)
    node = ir.node("Gather", [ir.Value(name="table"), ids], {"axis": 0}, outputs=[y])
    model = graph([node], [ids], [y], table=table)
    assert run([QuantizeEmbedding(scheme)], model) == {"QuantizeEmbedding": 1}
    cut = [] if width % 32 == 0 else ["Slice"]
    assert sorted(ops(model)) == sorted(["GatherBlockQuantized", *cut])
    chosen = np.array([3, 0, 19, 3])
    assert_close(session(model).run(None, {"ids": chosen})[0], rounded(table, scheme)[chosen])


def test_router_and_small_lookups_stay_float32():
    x, ids = value("x", ["T", 64]), value("ids", ["T"], ir.DataType.INT64)
    logits, picked = value("logits", ["T", 8]), value("picked", ["T"])
    index, weight = value("index", ["T", 2], ir.DataType.INT32), value("weight", ["T", 2])
    router = ir.node("MoERouter", [logits], attributes(RouterSpec(2)), domain=DOMAIN, outputs=[index, weight])
    lookup = ir.node("Gather", [ir.Value(name="vector"), ids], {"axis": 0}, outputs=[picked])
    model = graph(
        [gemm(x, "w", logits), router, lookup], [x, ids], [index, weight, picked], w=matrix(8, 64), vector=matrix(512)
    )
    assert run([PackProjections(), QuantizeLinear(IntFormat(4, 32)), QuantizeEmbedding(IntFormat(4, 32))], model) == {
        "PackProjections": 0,
        "QuantizeLinear": 0,
        "QuantizeEmbedding": 0,
    }


@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
def test_projections_of_one_input_are_packed(has_bias):
    x = value("x", ["T", 32])
    outs = {name: value(name, ["T", rows]) for name, rows in (("q", 48), ("k", 16), ("v", 16))}
    arrays = {f"w{name}": matrix(int(out.shape[1]), 32) for name, out in outs.items()}
    biases = {f"b{name}": matrix(int(out.shape[1])) for name, out in outs.items()} if has_bias else {}
    nodes = [gemm(x, f"w{name}", out, f"b{name}" if has_bias else None) for name, out in outs.items()]
    model = graph(nodes, [x], list(outs.values()), **arrays, **biases)
    assert run([PackProjections()], model) == {"PackProjections": 1}
    assert sorted(op for op in ops(model) if op != "Constant") == ["Gemm", "Split"]
    rows = matrix(5, 32)
    for got, name in zip(session(model).run(None, {"x": rows}), outs, strict=True):
        assert_close(got, rows @ arrays[f"w{name}"].T + biases.get(f"b{name}", np.float32(0)))


def test_projections_with_and_without_a_bias_are_not_packed_together():
    x, y, z = value("x", ["T", 16]), value("y", ["T", 16]), value("z", ["T", 16])
    model = graph(
        [gemm(x, "w", y, "b"), gemm(x, "v", z)], [x], [y, z], w=matrix(16, 16), v=matrix(16, 16), b=matrix(16)
    )
    assert run([PackProjections()], model) == {"PackProjections": 0}


def test_projections_are_packed_by_the_node_that_reads_them():
    """In a parallel layer the feed-forward reads what attention does; here only q, k and v are to be side by side."""
    x, y, *tables = (value(name, ["T", 16]) for name in ("x", "y", "cos", "sin", "start"))
    outs = {name: value(name, ["T", 16]) for name in ("q", "up", "k", "gate", "v", "shared")}
    nodes = [gemm(x, f"w{name}", out) for name, out in outs.items()]
    q, up, k, gate, v, shared = outs.values()
    nodes += [
        ir.node("SegmentAttention", [q, k, v, *tables], {"heads": 2}, domain=DOMAIN, outputs=[y]),
        ir.node("Mul", [shared, y]),
        ir.node("Mul", [shared, x]),
    ]
    weights = {f"w{name}": matrix(16, 16) for name in outs}
    model = graph(nodes, [x, *tables], [y, up, gate, *(node.outputs[0] for node in nodes[-2:])], **weights)
    assert PackProjections("SegmentAttention").apply(model) == 1
    (attention,) = [node for node in model.graph if node.op_type == "SegmentAttention"]
    qkv = whole(*attention.inputs[:3])
    assert qkv is not None and qkv.producer().op_type == "Gemm"
    assert ops(model).count("Gemm") == 4
    assert whole(*attention.inputs[:2]) is whole(attention.inputs[1], attention.inputs[0], attention.inputs[2]) is None


def test_residual_sum_and_norm_are_fused_and_the_sum_keeps_its_name():
    a, b, total, y = (value(name, ["T", 32]) for name in ("a", "b", "total", "y"))
    add = ir.node("Add", [a, b], outputs=[total])
    norm = ir.node("RMSNormalization", [total, ir.Value(name="g")], {"axis": -1, "epsilon": 1e-5}, outputs=[y])
    gain = matrix(32)
    model = graph([add, norm], [a, b], [y, total], g=gain)
    assert run([FuseSkipNorm()], model) == {"FuseSkipNorm": 1}
    assert ops(model) == ["SkipSimplifiedLayerNormalization"]
    left, right = matrix(6, 32), matrix(6, 32)
    got, kept = session(model).run(["y", "total"], {"a": left, "b": right})
    summed = left + right
    assert_close(kept, summed)
    assert_close(got, summed / np.sqrt((summed**2).mean(-1, keepdims=True) + np.float32(1e-5)) * gain)


def test_norm_of_anything_else_is_left():
    x, y = value("x", ["T", 32]), value("y", ["T", 32])
    norm = ir.node("RMSNormalization", [x, ir.Value(name="g")], {"axis": -1, "epsilon": 1e-5}, outputs=[y])
    assert FuseSkipNorm().apply(graph([norm], [x], [y], g=matrix(32))) == 0


def test_gated_gelu_has_no_quantized_kernel_and_stays():
    model = Case(RouterSpec(2), ExpertsSpec("gelu_tanh")).model()
    assert run([LowerMoE(), QuantizeExperts(IntFormat(4, 32))], model) == {"LowerMoE": 0, "QuantizeExperts": 0}
