"""Nodes and initializers of a graph that is being made."""

from typing import Any

import numpy as np
import onnx_ir as ir

from moevlm.export.graph.weights import Constant, Weight, initializer


class Nodes:
    """nodes: in order. initializers: by name."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append one node; returns its output value, or a list of them."""
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def constant(self, value: Any, dtype: type = np.int64) -> ir.Value:
        """A small initializer, one for all uses of the same value."""
        array: np.ndarray = np.asarray(value, dtype)
        name = f"const.{array.dtype}.{'x'.join(map(str, array.shape))}.{'_'.join(map(str, array.flatten()))}"
        return self.initializer(name, Constant(array))

    def ones(self, shape: list[int]) -> ir.Value:
        """float32 ones of a shape, one initializer for all uses."""
        return self.initializer(f"ones.{'x'.join(map(str, shape))}", Constant(np.ones(shape, np.float32)))

    def initializer(self, name: str, weight: Weight) -> ir.Value:
        """A weight, once under its name."""
        if name not in self.initializers:
            self.initializers[name] = initializer(name, weight)
        return self.initializers[name]
