"""What each operator of torch becomes in ONNX: one function an operator, which appends nodes to the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from moevlm.export.modules import ops  # noqa: F401 - defines torch.ops.moevlm

if TYPE_CHECKING:
    from moevlm.export.graph.translate import Translator

aten, moe = torch.ops.aten, torch.ops.moevlm

# By operator: the function that takes the translator and the operator's arguments, values in the place of tensors.
RULES: dict[Any, Callable[..., Any]] = {}


def _rule(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


@_rule(aten.linear.default)
def _linear(t: Translator, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    # Every activation is a matrix of rows here, so the weight is used as stored, [out, in].
    return t.op("Gemm", x, weight, bias, transB=1) if bias is not None else t.op("Gemm", x, weight, transB=1)


@_rule(aten.embedding.default)
def _embedding(t: Translator, table: ir.Value, index: ir.Value, *_: Any) -> ir.Value:
    return t.op("Gather", table, index, axis=0)


@_rule(aten.index_select.default)
def _index_select(t: Translator, x: ir.Value, axis: int, index: ir.Value) -> ir.Value:
    return t.op("Gather", x, index, axis=axis)


@_rule(aten.select.int)
def _select(t: Translator, x: ir.Value, axis: int, index: int) -> ir.Value:
    return t.op("Gather", x, t.constant(index), axis=axis)


@_rule(aten.rms_norm.default)
def _rms_norm(t: Translator, x: ir.Value, shape: list[int], weight: ir.Value | None, epsilon: float) -> ir.Value:
    weight = t.ones(shape) if weight is None else weight
    return t.op("RMSNormalization", x, weight, axis=-len(shape), epsilon=epsilon)


@_rule(aten.layer_norm.default)
def _layer_norm(
    t: Translator, x: ir.Value, shape: list[int], weight: ir.Value, bias: ir.Value, epsilon: float = 1e-5, *_: Any
) -> ir.Value:
    return t.op("LayerNormalization", x, weight, bias, axis=-len(shape), epsilon=epsilon)


@_rule(aten.gelu.default)
def _gelu(t: Translator, x: ir.Value, approximate: str = "none") -> ir.Value:
    return t.op("Gelu", x, approximate=approximate)


@_rule(aten.silu.default)
def _silu(t: Translator, x: ir.Value) -> ir.Value:
    return t.op("Mul", x, t.op("Sigmoid", x))


@_rule(aten.sigmoid.default)
def _sigmoid(t: Translator, x: ir.Value) -> ir.Value:
    return t.op("Sigmoid", x)


@_rule(aten.add.Tensor)
def _add(t: Translator, a: ir.Value, b: ir.Value) -> ir.Value:
    return t.op("Add", a, b)


@_rule(aten.sub.Tensor)
def _sub(t: Translator, a: ir.Value, b: ir.Value) -> ir.Value:
    return t.op("Sub", a, b)


@_rule(aten.mul.Tensor)
def _mul(t: Translator, a: ir.Value, b: ir.Value | float) -> ir.Value:
    return t.op("Mul", a, b if isinstance(b, ir.Value) else t.constant(b, np.float32))


@_rule(aten.div.Tensor)
def _div(t: Translator, a: ir.Value, b: float) -> ir.Value:
    return t.op("Div", a, t.constant(b, np.float32))


@_rule(aten.tanh.default)
def _tanh(t: Translator, x: ir.Value) -> ir.Value:
    return t.op("Tanh", x)


@_rule(aten.where.self)
def _where(t: Translator, condition: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    return t.op("Where", condition, a, b)


@_rule(aten.where.ScalarOther)
def _where_scalar(t: Translator, condition: ir.Value, a: ir.Value, b: float) -> ir.Value:
    return t.op("Where", condition, a, t.constant(b, _numpy(a)))


@_rule(aten.where.ScalarSelf)
def _scalar_where(t: Translator, condition: ir.Value, a: float, b: ir.Value) -> ir.Value:
    return t.op("Where", condition, t.constant(a, _numpy(b)), b)


@_rule(aten.eq.Scalar)
def _eq(t: Translator, x: ir.Value, value: int) -> ir.Value:
    return t.op("Equal", x, t.constant(value, _numpy(x)))


@_rule(aten.logical_or.default)
def _or(t: Translator, a: ir.Value, b: ir.Value) -> ir.Value:
    return t.op("Or", a, b)


@_rule(aten.ge.Scalar)
def _ge(t: Translator, x: ir.Value, bound: int) -> ir.Value:
    return t.op("GreaterOrEqual", x, t.constant(bound))


@_rule(aten.clamp.default)
def _clamp(t: Translator, x: ir.Value, low: int) -> ir.Value:
    return t.op("Max", x, t.constant(low))


@_rule(aten.sum.dim_IntList)
def _sum(t: Translator, x: ir.Value, axes: list[int]) -> ir.Value:
    return t.op("ReduceSum", x, t.constant(axes), keepdims=0)


@_rule(aten.mean.dim)
def _mean(t: Translator, x: ir.Value, axes: list[int]) -> ir.Value:
    return t.op("ReduceMean", x, t.constant(axes), keepdims=0)


@_rule(aten.unsqueeze.default)
def _unsqueeze(t: Translator, x: ir.Value, axis: int) -> ir.Value:
    return t.op("Unsqueeze", x, t.constant([axis]))


@_rule(aten.stack.default)
def _stack(t: Translator, tensors: list[ir.Value], axis: int = 0) -> ir.Value:
    return t.op("Concat", *(_unsqueeze(t, x, axis) for x in tensors), axis=axis)


@_rule(aten.cat.default)
def _cat(t: Translator, tensors: list[ir.Value], axis: int = 0) -> ir.Value:
    return t.op("Concat", *tensors, axis=axis)


@_rule(aten.split_with_sizes.default)
def _split(t: Translator, x: ir.Value, sizes: list[int], axis: int = 0) -> list[ir.Value]:
    return t.op("Split", x, t.constant(sizes), outputs=len(sizes), axis=axis)


@_rule(aten.chunk.default)
def _chunk(t: Translator, x: ir.Value, chunks: int, axis: int) -> list[ir.Value]:
    return t.op("Split", x, outputs=chunks, axis=axis, num_outputs=chunks)


@_rule(aten.view.default, aten.reshape.default)
def _view(t: Translator, x: ir.Value, shape: list[int]) -> ir.Value:
    return t.op("Reshape", x, t.constant(shape))


@_rule(aten.unflatten.int)
def _unflatten(t: Translator, x: ir.Value, _: int, sizes: list[int]) -> ir.Value:
    # Rows [T, n * d] to [T, n, d]; 0 keeps the first axis.
    return t.op("Reshape", x, t.constant([0, *sizes]))


@_rule(aten.flatten.using_ints)
def _flatten(t: Translator, x: ir.Value, start: int = 0, *_: int) -> ir.Value:
    return t.op("Reshape", x, t.constant([0] * start + [-1]))


@_rule(aten.slice.Tensor)
def _slice(t: Translator, x: ir.Value, axis: int, start: int, end: int) -> ir.Value:
    return t.op("Slice", x, t.constant([start]), t.constant([end]), t.constant([axis]))


@_rule(aten.pad.default)
def _pad(t: Translator, x: ir.Value, sizes: list[int], _: str = "constant", value: float = 0.0) -> ir.Value:
    """sizes: before and after, the last axis first."""
    assert x.shape is not None
    before, after = ([0] * (len(x.shape) - len(sizes) // 2) + sizes[i::2][::-1] for i in range(2))
    return t.op("Pad", x, t.constant([*before, *after]), t.constant(value, np.float32))


@_rule(aten.floor_divide.default)
def _floor_divide(t: Translator, x: ir.Value, divisor: int) -> ir.Value:
    """Of integers that are not negative."""
    assert x.dtype is not None
    return t.op("Div", x, t.constant(divisor, x.dtype.numpy().type))


@_rule(moe.tap.default)
def _tap(_: Translator, x: ir.Value, name: str) -> ir.Value:
    x.name = name
    return x


def _numpy(value: ir.Value) -> type:
    assert value.dtype is not None
    return value.dtype.numpy().type
