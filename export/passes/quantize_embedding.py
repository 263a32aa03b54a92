"""The token embedding as integers, of which the rows asked for are widened."""

import onnx_ir as ir

from moevlm.export.passes.base import Pass
from moevlm.export.passes.quantize_linear import CONTRIB, quantized
from moevlm.export.quantization import Scheme


class QuantizeEmbedding(Pass):
    """Gather from a stored matrix -> com.microsoft::GatherBlockQuantized.

    A row is read once per token, so the bits of an embedding cost memory but no time.
    Requires: nothing. Ensures: no float32 matrix is looked up by rows.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if _is_embedding(node)]
        for node in found:
            self._replace(model.graph, node)
        if found:
            model.graph.opset_imports[CONTRIB] = 1
        return len(found)

    def _replace(self, graph: ir.Graph, node: ir.Node) -> None:
        table, index = node.inputs
        assert table is not None
        attributes = {"bits": self.scheme.bits, "block_size": self.scheme.block, "gather_axis": 0, "quantize_axis": 1}
        values, scales = quantized(graph, table, self.scheme, flat=True)
        new = ir.node("GatherBlockQuantized", [values, index, scales], attributes=attributes, domain=CONTRIB)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)


def _is_embedding(node: ir.Node) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" and not node.domain else None
    if table is None or not table.is_initializer() or node.attributes.get_int("axis", 0) != 0:
        return False
    return table.dtype == ir.DataType.FLOAT and len(table.shape or ()) == 2
