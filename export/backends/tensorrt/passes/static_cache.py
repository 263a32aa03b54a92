"""Caches of a fixed capacity."""

import onnx_ir as ir

from moevlm.export.passes.base import Pass


class StaticCache(Pass):
    """The open dimension "capacity" of every cache -> a number, which TensorRT needs to update it in place.

    Requires: caches [batch, heads, capacity, head_dim]. Ensures: batch is their only open dimension.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def apply(self, model: ir.Model) -> int:
        caches = [v for v in (*model.graph.inputs, *model.graph.outputs) if "_cache" in str(v.name)]
        for value in caches:
            assert value.shape is not None
            batch, heads, _, head_dim = value.shape
            value.shape = ir.Shape([batch, heads, self.capacity, head_dim])
        return len(caches)
