"""Makes nodes of a graph, as passes need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from moevlm.export.graph.weights import Constant, initializer


class Builder:
    """Puts nodes in front of the node `before`, and small constants among the initializers, each once in a graph."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str) -> None:
        """prefix: of the constants' names, which several builders of one graph share."""
        self.graph, self.before, self._prefix = graph, before, prefix

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The output of a new node."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """The outputs of a new node."""
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        self.graph.insert_before(self.before, node)
        return node.outputs

    def array(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant; of two with one name the first counts."""
        name = f"{self._prefix}.{name}"
        if name not in self.graph.initializers:
            self.graph.register_initializer(initializer(name, Constant(array)))
        return self.graph.initializers[name]

    def integer(self, value: int) -> ir.Value:
        """int64, a scalar."""
        return self.array(str(value), np.array(value, np.int64))

    def integers(self, *values: int) -> ir.Value:
        """int64, a list."""
        return self.array("_".join(map(str, ("list", *values))), np.array(values, np.int64))

    def replace(self, node: ir.Node, values: Sequence[ir.Value]) -> None:
        """`values` in the place of a node's outputs, under their names; the node goes."""
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [], node.outputs, values)


def width(rows: ir.Value | None) -> int:
    """The fixed last dimension of rows."""
    assert rows is not None and rows.shape is not None
    found = rows.shape[-1]
    assert isinstance(found, int)
    return found
