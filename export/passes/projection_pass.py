"""What the passes have in common that quantize projections."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.formats.integers import IntFormat
from moevlm.export.passes.base import NodePass, left, replaced_routers
from moevlm.export.passes.pack_projections import is_projection


class ProjectionPass(NodePass):
    """Replaces every Gemm with a stored weight but routers', whose logits stay float32. scheme: of the weights."""

    def __init__(self, scheme: IntFormat) -> None:
        self.scheme = scheme

    def requires(self, model: ir.Model) -> Iterator[str]:
        """The moevlm routers are still there."""
        yield from replaced_routers(model)

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """Of the Gemms with stored weights, only routers' are left."""
        yield from left(model, "that project", is_projection)

    def matches(self, node: ir.Node) -> bool:
        return is_projection(node)
