"""Graphs lowered for TensorRT, run in onnx's reference evaluator; a program's bytes name its op."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_attention import Attention as StandardAttention

from moevlm.export.backends.tensorrt.passes.plugin_moe import DOMAIN, expert_weights
from moevlm.export.backends.tensorrt.passes.rectangular_steps import RectangularSteps
from moevlm.export.formats.gpu_packing import unpack
from moevlm.export.formats.registry import weight_format
from moevlm.export.graph.moe_functions import EXPERTS
from moevlm.export.graph.op import is_op
from moevlm.export.graph.weights import read
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.ops.experts import experts
from moevlm.plugins.ops.router import route, sigmoid
from moevlm.runtime.core.dtypes import DTYPES

_OPS: dict[str, Any] = {}


def named(op: KernelOp) -> bytes:
    """In the place of an op's program: a name under which the evaluator finds the op."""
    name = repr(op)
    _OPS[name] = op
    return name.encode()


class MoERouter(OpRun):
    op_domain = DOMAIN

    def _run(self, *inputs: np.ndarray, program: str) -> tuple[np.ndarray, ...]:
        op = _OPS[program]
        _check(op.inputs, inputs)
        return route(inputs[0], op.spec, *inputs[1:])


class MoEExperts(OpRun):
    op_domain = DOMAIN

    def _run(self, *inputs: np.ndarray, program: str) -> tuple[np.ndarray, ...]:
        op = _OPS[program]
        _check(op.inputs, inputs)
        x, index, weight = inputs[:3]
        exact = _unpacked(op, inputs[3:])
        return (experts(x.astype(np.float32), index, weight, spec=op.spec, **exact).astype(x.dtype),)


def _unpacked(op: ExpertsOp, arrays: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Weights and biases by name, float32. arrays: as the op stores them."""
    held = dict(zip((tensor.name for tensor in op.inputs[3:]), arrays, strict=True))
    if op.weights:
        form = weight_format(op.weights, op.group_size, op.dtype)
        for name, width in (("gate_up", op.hidden), ("down", op.inner)):
            held[name] = unpack(held[name], held.pop(f"{name}_scale"), form, width)
    return {name: array.astype(np.float32) for name, array in held.items()}


class Attention(StandardAttention):
    """The standard op, with an attribute of TensorRT's."""

    op_domain = ""

    def _run(self, *inputs: np.ndarray, TRT_decomposable: int, **attributes: Any) -> tuple[np.ndarray, ...]:
        assert TRT_decomposable == 1
        return super()._run(*inputs, **attributes)


class TRT_MoE(OpRun):
    """As TensorRT documents its MoE layer: [B, S, H], weights [E, H, I], [E, H, I], [E, I, H]."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, index: np.ndarray, scores: np.ndarray, *weights: np.ndarray, activation_type: int
    ) -> Any:
        assert activation_type == 1
        assert {scores.dtype, *(w.dtype for w in weights)} == {x.dtype}
        gate, up, down, *biases = (w.astype(np.float64) for w in weights)
        y = np.zeros(x.shape, np.float64)
        for place in np.ndindex(*index.shape):
            e, row = index[place], x[place[:2]].astype(np.float64)
            inner, other = row @ gate[e], row @ up[e]
            if biases:
                inner, other = inner + biases[0][e], other + biases[1][e]
            out = (inner * sigmoid(inner) * other) @ down[e]
            y[place[:2]] += float(scores[place]) * (out + biases[2][e] if biases else out)
        return (y.astype(x.dtype),)


def _check(tensors: Any, inputs: tuple[np.ndarray, ...]) -> None:
    for tensor, array in zip(tensors, inputs, strict=True):
        assert array.dtype == DTYPES[tensor.dtype].numpy
        assert tuple(size for size in tensor.shape if size >= 0) == array.shape[tensor.shape.count(-1) :]


class Evaluator:
    """A lowered graph. experts: their weights, by name, read once."""

    def __init__(self, model: ir.Model) -> None:
        self._inputs, self._outputs = list(model.graph.inputs), list(model.graph.outputs)
        self._evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[MoERouter, MoEExperts, Attention, TRT_MoE])
        self.experts = {name: read(weight) for name, weight in expert_weights(model).items()}

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, float32. feeds: float32 where this one may want another dtype."""
        given = dict(self.experts)
        for value in self._inputs:
            if value.name in feeds:
                assert value.dtype is not None
                given[str(value.name)] = feeds[value.name].astype(value.dtype.numpy())
        arrays = self._evaluator.run(None, given)
        for value, array in zip(self._outputs, arrays, strict=True):
            assert ir.DataType.from_numpy(array.dtype) is value.dtype
        return {str(v.name): array.astype(np.float32) for v, array in zip(self._outputs, arrays, strict=True)}


def evaluate(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As `Evaluator.run`, once."""
    return Evaluator(model).run(feeds)


def canonical_outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the float32 graph, its function bodies run by ONNX Runtime. feeds: of the plan's graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, packed(feeds)), strict=True))


def with_stored_experts(canonical: ir.Model, lowered: ir.Model) -> ir.Model:
    """The canonical graph with the experts' weights as the lowered one stores them: what is left is arithmetic."""
    model, stored = canonical.clone(), expert_weights(lowered)
    for node in model.graph:
        if not is_op(node, EXPERTS):
            continue
        twin = next(other for other in lowered.graph if other.name == node.name)
        arrays = [read(stored[str(value.name)]) for value in twin.inputs[3:] if value is not None]
        unpacked = _unpacked(_OPS[twin.attributes["program"].value.decode()], arrays)
        for value, array in zip(node.inputs[3:], unpacked.values(), strict=True):
            assert value is not None
            value.const_value = ir.tensor(array.reshape(value.shape.numpy()))
    return model


def in_question(name: str, array: np.ndarray, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Of a cache the positions that the step wrote, [B, heads, S, D]; anything else as it is."""
    if "_cache_out." not in name:
        return array
    new = np.arange(feeds["input_ids"].shape[1])
    return np.stack([rows[:, start + new] for rows, start in zip(array, feeds["cache_position"], strict=True)])


def random_feeds(model: ir.Model, sizes: dict[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Fresh inputs of a plan's graph, from the canonical one. sizes: of the plan's open dimensions."""
    model = model.clone()
    RectangularSteps().apply(model)
    sizes = {"starts": 4} | sizes
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        feeds[str(value.name)] = rng.standard_normal(shape).astype(value.dtype.numpy())
    for cos in [name for name in feeds if name.startswith("rope_cos")]:
        angle = rng.uniform(0, 6, feeds[cos].shape).astype(np.float32)
        feeds |= {cos: np.cos(angle), cos.replace("cos", "sin"): np.sin(angle)}
    ranges = {
        "input_ids": (0, 200),
        "visual_index": (-1, sizes.get("visual")),
        "cache_position": (0, sizes.get("capacity", 0) - sizes.get("sequence", 0) + 1),
        "logits_index": (0, sizes.get("batch", 0) * sizes.get("sequence", 0)),
        "position_index": (0, 25),
    }
    for name in ranges.keys() & feeds.keys():
        feeds[name] = rng.integers(*ranges[name], feeds[name].shape).astype(feeds[name].dtype)
    if "image_start" in feeds:
        borders = np.sort(rng.choice(np.arange(1, sizes["patches"]), sizes["starts"] - 2, replace=False))
        feeds["image_start"] = np.array([0, *borders, sizes["patches"]], np.int32)
    return feeds


def packed(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A step of a plan's graph as one of the canonical graph: sequence n has page n."""
    if "cache_position" not in feeds:
        return feeds
    batch, length = feeds["input_ids"].shape
    rectangular = ("input_ids", "visual_index", *(name for name in feeds if name.startswith("rope_")))
    rows = {name: feeds[name].reshape(batch * length, *feeds[name].shape[2:]) for name in rectangular}
    others = {name: array for name, array in feeds.items() if name not in rows and name != "cache_position"}
    return (
        rows
        | others
        | {
            "query_start": np.arange(0, batch * length + 1, length, dtype=np.int32),
            "context_len": feeds["cache_position"].astype(np.int32),
            "page_table": np.arange(batch, dtype=np.int32)[:, None],
        }
    )


def usual_error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative error that three of four rows exceed: a fault is in every row, but at a near tie a rounded router takes
    another expert, and that row and all behind it in its sequence are other ones.
    """
    assert got.shape == want.shape
    off, size = (np.linalg.norm(x.reshape(-1, x.shape[-1]), axis=1) for x in (got.astype(np.float64) - want, want))
    return float(np.quantile(off / size, 0.25))


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative, in the Frobenius norm."""
    assert got.shape == want.shape
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
