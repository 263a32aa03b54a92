"""What each operator of torch becomes in ONNX: one function an operator, which appends nodes to the graph."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from moevlm.export.graph.nodes import Nodes
from moevlm.export.modules import ops  # noqa: F401 - defines torch.ops.moevlm

aten, moe = torch.ops.aten, torch.ops.moevlm

# By operator: the function that takes the graph and the operator's arguments, values in the place of tensors.
RULES: dict[Any, Callable[..., Any]] = {}


def _rule(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


@_rule(aten.linear.default)
def _linear(graph: Nodes, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    # Every activation is a matrix of rows here, so the weight is used as stored, [out, in].
    return graph.op("Gemm", x, weight, bias, transB=1) if bias is not None else graph.op("Gemm", x, weight, transB=1)


@_rule(aten.embedding.default)
def _embedding(graph: Nodes, table: ir.Value, index: ir.Value, *_: Any) -> ir.Value:
    return graph.op("Gather", table, index, axis=0)


@_rule(aten.index_select.default)
def _index_select(graph: Nodes, x: ir.Value, axis: int, index: ir.Value) -> ir.Value:
    return graph.op("Gather", x, index, axis=axis)


@_rule(aten.select.int)
def _select(graph: Nodes, x: ir.Value, axis: int, index: int) -> ir.Value:
    return graph.op("Gather", x, graph.constant(index), axis=axis)


@_rule(aten.rms_norm.default)
def _rms_norm(graph: Nodes, x: ir.Value, shape: list[int], weight: ir.Value | None, epsilon: float) -> ir.Value:
    weight = graph.ones(shape) if weight is None else weight
    return graph.op("RMSNormalization", x, weight, axis=-len(shape), epsilon=epsilon)


@_rule(aten.layer_norm.default)
def _layer_norm(
    graph: Nodes, x: ir.Value, shape: list[int], weight: ir.Value, bias: ir.Value, epsilon: float = 1e-5, *_: Any
) -> ir.Value:
    return graph.op("LayerNormalization", x, weight, bias, axis=-len(shape), epsilon=epsilon)


@_rule(aten.gelu.default)
def _gelu(graph: Nodes, x: ir.Value, approximate: str = "none") -> ir.Value:
    return graph.op("Gelu", x, approximate=approximate)


@_rule(aten.silu.default)
def _silu(graph: Nodes, x: ir.Value) -> ir.Value:
    return graph.op("Mul", x, graph.op("Sigmoid", x))


@_rule(aten.sigmoid.default)
def _sigmoid(graph: Nodes, x: ir.Value) -> ir.Value:
    return graph.op("Sigmoid", x)


@_rule(aten.add.Tensor)
def _add(graph: Nodes, a: ir.Value, b: ir.Value) -> ir.Value:
    return graph.op("Add", a, b)


@_rule(aten.sub.Tensor)
def _sub(graph: Nodes, a: ir.Value, b: ir.Value) -> ir.Value:
    return graph.op("Sub", a, b)


@_rule(aten.mul.Tensor)
def _mul(graph: Nodes, a: ir.Value, b: ir.Value | float) -> ir.Value:
    return graph.op("Mul", a, b if isinstance(b, ir.Value) else graph.constant(b, np.float32))


@_rule(aten.div.Tensor)
def _div(graph: Nodes, a: ir.Value, b: float) -> ir.Value:
    return graph.op("Div", a, graph.constant(b, np.float32))


@_rule(aten.tanh.default)
def _tanh(graph: Nodes, x: ir.Value) -> ir.Value:
    return graph.op("Tanh", x)


@_rule(aten.where.self)
def _where(graph: Nodes, condition: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    return graph.op("Where", condition, a, b)


@_rule(aten.where.ScalarOther)
def _where_scalar(graph: Nodes, condition: ir.Value, a: ir.Value, b: float) -> ir.Value:
    return graph.op("Where", condition, a, graph.constant(b, _numpy(a)))


@_rule(aten.where.ScalarSelf)
def _scalar_where(graph: Nodes, condition: ir.Value, a: float, b: ir.Value) -> ir.Value:
    return graph.op("Where", condition, graph.constant(a, _numpy(b)), b)


@_rule(aten.eq.Scalar)
def _eq(graph: Nodes, x: ir.Value, value: int) -> ir.Value:
    return graph.op("Equal", x, graph.constant(value, _numpy(x)))


@_rule(aten.logical_or.default)
def _or(graph: Nodes, a: ir.Value, b: ir.Value) -> ir.Value:
    return graph.op("Or", a, b)


@_rule(aten.ge.Scalar)
def _ge(graph: Nodes, x: ir.Value, bound: int) -> ir.Value:
    return graph.op("GreaterOrEqual", x, graph.constant(bound))


@_rule(aten.clamp.default)
def _clamp(graph: Nodes, x: ir.Value, low: int) -> ir.Value:
    return graph.op("Max", x, graph.constant(low))


@_rule(aten.sum.dim_IntList)
def _sum(graph: Nodes, x: ir.Value, axes: list[int]) -> ir.Value:
    return graph.op("ReduceSum", x, graph.constant(axes), keepdims=0)


@_rule(aten.mean.dim)
def _mean(graph: Nodes, x: ir.Value, axes: list[int]) -> ir.Value:
    return graph.op("ReduceMean", x, graph.constant(axes), keepdims=0)


@_rule(aten.transpose.int)
def _transpose(graph: Nodes, x: ir.Value, first: int, second: int) -> ir.Value:
    assert x.shape is not None
    axes = list(range(len(x.shape)))
    axes[first], axes[second] = axes[second], axes[first]
    return graph.op("Transpose", x, perm=axes)


@_rule(aten.unsqueeze.default)
def _unsqueeze(graph: Nodes, x: ir.Value, axis: int) -> ir.Value:
    return graph.op("Unsqueeze", x, graph.constant([axis]))


@_rule(aten.stack.default)
def _stack(graph: Nodes, tensors: list[ir.Value], axis: int = 0) -> ir.Value:
    return graph.op("Concat", *(_unsqueeze(graph, x, axis) for x in tensors), axis=axis)


@_rule(aten.cat.default)
def _cat(graph: Nodes, tensors: list[ir.Value], axis: int = 0) -> ir.Value:
    return graph.op("Concat", *tensors, axis=axis)


@_rule(aten.split_with_sizes.default)
def _split(graph: Nodes, x: ir.Value, sizes: list[int], axis: int = 0) -> list[ir.Value]:
    return graph.op("Split", x, graph.constant(sizes), outputs=len(sizes), axis=axis)


@_rule(aten.chunk.default)
def _chunk(graph: Nodes, x: ir.Value, chunks: int, axis: int) -> list[ir.Value]:
    return graph.op("Split", x, outputs=chunks, axis=axis, num_outputs=chunks)


@_rule(aten.view.default, aten.reshape.default)
def _view(graph: Nodes, x: ir.Value, shape: list[int]) -> ir.Value:
    return graph.op("Reshape", x, graph.constant(shape))


@_rule(aten.unflatten.int)
def _unflatten(graph: Nodes, x: ir.Value, _: int, sizes: list[int]) -> ir.Value:
    # Rows [T, n * d] to [T, n, d]; 0 keeps the first axis.
    return graph.op("Reshape", x, graph.constant([0, *sizes]))


@_rule(aten.flatten.using_ints)
def _flatten(graph: Nodes, x: ir.Value, start: int = 0, *_: int) -> ir.Value:
    return graph.op("Reshape", x, graph.constant([0] * start + [-1]))


@_rule(aten.slice.Tensor)
def _slice(graph: Nodes, x: ir.Value, axis: int, start: int, end: int) -> ir.Value:
    return graph.op("Slice", x, graph.constant([start]), graph.constant([end]), graph.constant([axis]))


@_rule(aten.pad.default)
def _pad(graph: Nodes, x: ir.Value, sizes: list[int], _: str = "constant", value: float = 0.0) -> ir.Value:
    """sizes: before and after, the last axis first."""
    assert x.shape is not None
    before, after = ([0] * (len(x.shape) - len(sizes) // 2) + sizes[i::2][::-1] for i in range(2))
    return graph.op("Pad", x, graph.constant([*before, *after]), graph.constant(value, np.float32))


@_rule(aten.floor_divide.default)
def _floor_divide(graph: Nodes, x: ir.Value, divisor: int) -> ir.Value:
    """Of integers that are not negative."""
    assert x.dtype is not None
    return graph.op("Div", x, graph.constant(divisor, x.dtype.numpy().type))


@_rule(moe.tap.default)
def _tap(_: Nodes, x: ir.Value, name: str) -> ir.Value:
    x.name = name
    return x


def _numpy(value: ir.Value) -> type:
    assert value.dtype is not None
    return value.dtype.numpy().type
