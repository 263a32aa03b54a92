"""The token embedding as integers, of which the rows asked for are widened."""

import onnx_ir as ir

from moevlm.export.passes.base import CONTRIB, NodePass, substitute
from moevlm.export.passes.quantize_linear import quantized
from moevlm.export.quantization import Scheme


class QuantizeEmbedding(NodePass):
    """Gather from a stored matrix -> com.microsoft::GatherBlockQuantized.

    A row is read once per token, so the bits of an embedding cost memory but no time.
    Requires: nothing. Ensures: no float32 matrix is looked up by rows.
    """

    domain = CONTRIB

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def matches(self, node: ir.Node) -> bool:
        return _is_embedding(node)

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        table, index = node.inputs
        assert table is not None
        attributes = {"bits": self.scheme.bits, "block_size": self.scheme.block, "gather_axis": 0, "quantize_axis": 1}
        values, scales = quantized(graph, table, self.scheme, flat=True)
        new = ir.node("GatherBlockQuantized", [values, index, scales], attributes=attributes, domain=CONTRIB)
        substitute(graph, node, new)


def _is_embedding(node: ir.Node) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" and not node.domain else None
    if table is None or not table.is_initializer() or node.attributes.get_int("axis", 0) != 0:
        return False
    return table.dtype == ir.DataType.FLOAT and len(table.shape or ()) == 2
