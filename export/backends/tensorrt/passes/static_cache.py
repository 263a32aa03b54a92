"""Caches of a fixed capacity."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.backends.tensorrt.passes.rectangular_steps import paged
from moevlm.export.graph.op import is_op
from moevlm.export.graph.paged_attention import PAGED_ATTENTION, caches
from moevlm.export.passes.base import Pass


class StaticCache(Pass):
    """The open dimension "capacity" of every cache -> a number, which TensorRT needs to update it in place."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def requires(self, model: ir.Model) -> Iterator[str]:
        """RectangularSteps has run."""
        yield from paged(model)

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """The batch is the only open dimension of a cache."""
        for value in _caches(model):
            if value.shape is None or not all(isinstance(size, int) for size in value.shape[1:]):
                yield f"{value.name} is {value.shape}"

    def apply(self, model: ir.Model) -> int:
        values = _caches(model)
        for value in values:
            assert value.shape is not None
            batch, heads, _, head_dim = value.shape
            value.shape = ir.Shape([batch, heads, self.capacity, head_dim])
        return len(values)


def _caches(model: ir.Model) -> list[ir.Value]:
    nodes = [node for node in model.graph if is_op(node, PAGED_ATTENTION)]
    return [value for node in nodes for pair in caches(node) for value in pair]
