"""Projections onto one number as sums over a row."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.graph.builder import Builder
from moevlm.export.graph.weights import weight_of
from moevlm.export.passes.base import Pass, left
from moevlm.export.passes.pack_projections import has_stored_weight


class RowSums(Pass):
    """A Gemm with one row of weights, as the gate of a shared expert, -> a product and a sum, in float32.

    TensorRT adds these to the kernel that makes their input. A Gemm it would join to others of that input, and split
    the result again: three kernels more.
    """

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No such Gemm is left."""
        yield from left(model, "with one row of weights", _has_one_row)

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if _has_one_row(node)]
        for node in found:
            (x, weight), (y,) = node.inputs[:2], node.outputs
            b = Builder(model.graph, node, "sum")
            exact = [b.op("Cast", value, to=ir.DataType.FLOAT) for value in (x, weight) if value is not None]
            total = b.op("ReduceSum", b.op("Mul", *exact), b.integers(-1), keepdims=1)
            made = b.op("Cast", total, to=y.dtype or ir.DataType.FLOAT)
            made.shape, made.type = y.shape, y.type
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [], [y], [made])
        return len(found)


def _has_one_row(node: ir.Node) -> bool:
    weight = node.inputs[1] if has_stored_weight(node) and len(node.inputs) == 2 else None
    return weight is not None and weight_of(weight).shape[0] == 1
