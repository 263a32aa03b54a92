"""What the passes have in common that quantize projections."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.formats.integers import IntFormat
from moevlm.export.passes.base import NodePass, left, replaced_deciders
from moevlm.export.passes.pack_projections import is_projection


class ProjectionPass(NodePass):
    """Replaces every projection, see `is_projection`; the other Gemms stay float32. scheme: of the weights."""

    def __init__(self, scheme: IntFormat) -> None:
        self.scheme = scheme

    def requires(self, model: ir.Model) -> Iterator[str]:
        """The moevlm routers and gated states are still there."""
        yield from replaced_deciders(model)

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No projection is left."""
        yield from left(model, "that project", is_projection)

    def matches(self, node: ir.Node) -> bool:
        return is_projection(node)
