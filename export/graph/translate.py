"""An exported torch program to an onnx_ir graph, node by node.

The canonical modules use a closed set of operators, so the table in `rules` is the whole translation: no decomposition
pass, no optimiser to undo, and every initializer keeps its parameter's name.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import onnx_ir as ir
import torch

from moevlm.export.graph import functions  # noqa: F401 - its imports register the ops
from moevlm.export.graph.nodes import Nodes
from moevlm.export.graph.op import ONNX_OPSET, traced_op
from moevlm.export.graph.rules import RULES
from moevlm.export.graph.weights import Weight
from moevlm.plugins.ops.spec import DOMAIN, OPSET_VERSION
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import ExportError

IR_VERSION = 11


class Translator:
    """Builds one graph from one `torch.export.ExportedProgram`.

    weights: parameter name -> where its values are; a parameter that the program never uses is not looked up.
    """

    def __init__(self, program: torch.export.ExportedProgram, weights: Mapping[str, Weight]) -> None:
        self.program, self.weights = program, weights
        self.values: dict[torch.fx.Node, Any] = {}
        self.graph = Nodes()
        self.symbols: dict[str, str] = {}

    def model(self, name: str, inputs: Mapping[str, tuple[str | int, ...]], outputs: tuple[str, ...]) -> ir.Model:
        """The finished model. inputs: name and symbolic shape, in the program's order; outputs: names in order."""
        parameters = self.program.graph_signature.inputs_to_parameters
        graph_inputs, remaining, results = [], list(inputs.items()), []
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in parameters:
                if node.users:
                    parameter = parameters[node.name]
                    self.values[node] = self.graph.initializer(parameter, self.weights[parameter])
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
            nodes=self.graph.nodes,
            initializers=list(self.graph.initializers.values()),
            opset_imports={"": ONNX_OPSET, DOMAIN: OPSET_VERSION},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="moevlm")

    def _call(self, node: torch.fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            return self._typed(self._argument(source)[index], node.meta["val"])
        rule = RULES.get(node.target) or _registered(node)
        if rule is None:
            raise ExportError(f"no ONNX translation for {node.target} (known: {', '.join(map(str, RULES))})")
        result = rule(self.graph, *(self._argument(a) for a in node.args), **node.kwargs)
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

    def rule(graph: Nodes, *values: Any) -> Any:
        given = dict(zip(names, values, strict=True))
        inputs = [value for name, value in given.items() if name not in attributes]
        while inputs and inputs[-1] is None:
            inputs.pop()
        outputs = len(made) if isinstance(made, list | tuple) else 1
        spec = {name: value for name, value in given.items() if name in attributes}
        return graph.op(op.name, *inputs, outputs=outputs, domain=DOMAIN, **spec)

    return rule
