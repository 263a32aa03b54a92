"""The token embedding as integers, of which the rows asked for are widened."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.formats.integers import IntFormat
from moevlm.export.graph.builder import Builder
from moevlm.export.graph.weights import weight_of
from moevlm.export.passes.base import CONTRIB, NodePass, left
from moevlm.export.passes.quantize_linear import quantized


class QuantizeEmbedding(NodePass):
    """Gather from a stored matrix -> com.microsoft::GatherBlockQuantized.

    A row is read once per token, so the bits of an embedding cost memory but no time. The kernel yields whole groups:
    of a width that the group size does not divide, a Slice cuts the padding off again.
    """

    domain = CONTRIB

    def __init__(self, scheme: IntFormat) -> None:
        self.scheme = scheme

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No float32 matrix is looked up by rows."""
        yield from left(model, "that look up a float32 matrix", _is_embedding)

    def matches(self, node: ir.Node) -> bool:
        return _is_embedding(node)

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        table, index = node.inputs
        assert table is not None
        attributes = {
            "bits": self.scheme.bits,
            "block_size": self.scheme.group_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        values, scales = quantized(graph, table, self.scheme, flat=True)
        b, width = Builder(graph, node, "embedding"), weight_of(table).shape[1]
        rows = b.op("GatherBlockQuantized", values, index, scales, domain=CONTRIB, **attributes)
        if width % self.scheme.group_size:
            rows = b.op("Slice", rows, *(b.integers(n) for n in (0, width, -1)))
        b.replace(node, [rows])


def _is_embedding(node: ir.Node) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" and not node.domain else None
    if table is None or not table.is_initializer() or node.attributes.get_int("axis", 0) != 0:
        return False
    return table.dtype == ir.DataType.FLOAT and len(table.shape or ()) == 2
