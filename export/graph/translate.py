"""An exported torch program to an onnx_ir graph, node by node.

The canonical modules use a closed set of operators, so this table is the whole translation: no decomposition pass, no
optimiser to undo, and every initializer keeps its parameter's name.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from moevlm.export.graph import functions  # noqa: F401 - its imports register the ops
from moevlm.export.graph.op import ONNX_OPSET, traced_op
from moevlm.export.graph.weights import Constant, Weight, initializer
from moevlm.export.modules import ops  # noqa: F401 - defines torch.ops.moevlm
from moevlm.plugins.ops.spec import DOMAIN, OPSET_VERSION
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import ExportError

IR_VERSION = 11
aten, moe = torch.ops.aten, torch.ops.moevlm


class Translator:
    """Builds one graph from one `torch.export.ExportedProgram`.

    weights: parameter name -> where its values are; a parameter that the program never uses is not looked up.
    """

    def __init__(self, program: torch.export.ExportedProgram, weights: Mapping[str, Weight]) -> None:
        self.program, self.weights = program, weights
        self.values: dict[torch.fx.Node, Any] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.symbols: dict[str, str] = {}

    def model(self, name: str, inputs: Mapping[str, tuple[str | int, ...]], outputs: tuple[str, ...]) -> ir.Model:
        """The finished model. inputs: name and symbolic shape, in the program's order; outputs: names in order."""
        parameters = self.program.graph_signature.inputs_to_parameters
        graph_inputs, remaining, results = [], list(inputs.items()), []
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in parameters:
                if node.users:
                    self.values[node] = self._initializer(parameters[node.name], self.weights[parameters[node.name]])
            elif node.op == "placeholder":
                if node.meta.get("val") is None:  # an optional input that this model does not have
                    self.values[node] = None
                    continue
                input_name, shape = remaining.pop(0)
                dimensions = zip(node.meta["val"].shape, shape, strict=True)
                self.symbols |= {str(dimension): size for dimension, size in dimensions if isinstance(size, str)}
                self.values[node] = self._typed(ir.Value(name=input_name), node.meta["val"])
                graph_inputs.append(self.values[node])
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                results = [self.values[n] for n in node.args[0] if n is not None]
        for value, output_name in zip(results, outputs, strict=True):
            value.name = output_name
        graph = ir.Graph(
            graph_inputs,
            results,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": ONNX_OPSET, DOMAIN: OPSET_VERSION},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="moevlm")

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append one node; returns its output value, or a list of them."""
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def constant(self, value: Any, dtype: type = np.int64) -> ir.Value:
        """A small initializer, one for all uses of the same value."""
        array: np.ndarray = np.asarray(value, dtype)
        name = f"const.{array.dtype}.{'x'.join(map(str, array.shape))}.{'_'.join(map(str, array.flatten()))}"
        return self._initializer(name, Constant(array))

    def ones(self, shape: list[int]) -> ir.Value:
        """float32 ones of a shape, one initializer for all uses."""
        return self._initializer(f"ones.{'x'.join(map(str, shape))}", Constant(np.ones(shape, np.float32)))

    def _initializer(self, name: str, weight: Weight) -> ir.Value:
        if name not in self.initializers:
            self.initializers[name] = initializer(name, weight)
        return self.initializers[name]

    def _call(self, node: torch.fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            return self._typed(self._argument(source)[index], node.meta["val"])
        rule = _RULES.get(node.target) or _registered(node)
        if rule is None:
            raise ExportError(f"no ONNX translation for {node.target} (known: {', '.join(map(str, _RULES))})")
        result = rule(self, *(self._argument(a) for a in node.args), **node.kwargs)
        return self._typed(result, node.meta["val"]) if isinstance(result, ir.Value) else result

    def _typed(self, value: ir.Value, tensor: torch.Tensor) -> ir.Value:
        """Dtype and shape from the trace; a dimension keeps its name, or stays open if it is computed from others."""
        value.type = ir.TensorType(ir.DataType(DTYPES[str(tensor.dtype).removeprefix("torch.")].onnx))
        value.shape = ir.Shape([d if isinstance(d, int) else self.symbols.get(str(d)) for d in tensor.shape])
        return value

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            return self.values[argument]
        if isinstance(argument, list | tuple):
            return [self._argument(a) for a in argument]
        return argument


_RULES: dict[Any, Callable[..., Any]] = {}


def _registered(node: torch.fx.Node) -> Callable[..., Any] | None:
    """The rule of a registered op: one node, whose arguments are its inputs and then its attributes."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != DOMAIN:
        return None
    schema = node.target._schema
    op = traced_op(schema.name.removeprefix(f"{DOMAIN}::"))
    if op is None:
        return None
    names, attributes = [argument.name for argument in schema.arguments], {field.name for field in fields(op.spec)}
    made = node.meta["val"]

    def rule(t: Translator, *values: Any) -> Any:
        given = dict(zip(names, values, strict=True))
        inputs = [value for name, value in given.items() if name not in attributes]
        while inputs and inputs[-1] is None:
            inputs.pop()
        outputs = len(made) if isinstance(made, list | tuple) else 1
        spec = {name: value for name, value in given.items() if name in attributes}
        return t.op(op.name, *inputs, outputs=outputs, domain=DOMAIN, **spec)

    return rule


def _rule(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _RULES.update(dict.fromkeys(targets, function))
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
