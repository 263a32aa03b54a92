"""Caches of a fixed capacity."""

import onnx_ir as ir

from moevlm.export.graph.op import is_op
from moevlm.export.graph.paged_attention import PAGED_ATTENTION, caches
from moevlm.export.passes.base import Pass


class StaticCache(Pass):
    """The open dimension "capacity" of every cache -> a number, which TensorRT needs to update it in place.

    Requires: moevlm ops are still there; RectangularSteps. Ensures: batch is their only open dimension.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def apply(self, model: ir.Model) -> int:
        nodes = [node for node in model.graph if is_op(node, PAGED_ATTENTION)]
        values = [value for node in nodes for pair in caches(node) for value in pair]
        for value in values:
            assert value.shape is not None
            batch, heads, _, head_dim = value.shape
            value.shape = ir.Shape([batch, heads, self.capacity, head_dim])
        return len(values)
