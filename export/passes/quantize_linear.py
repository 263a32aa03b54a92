"""Projections and the embedding on ONNX Runtime's kernels for block-quantized weights."""

import onnx_ir as ir

from moevlm.export.passes.base import Pass
from moevlm.export.passes.pack_projections import is_projection
from moevlm.export.quantization import Quantized, Scheme
from moevlm.export.weights import drop_unused, initializer, weight_of

CONTRIB = "com.microsoft"
# The kernel may round activations to int8 per block: twice the speed of level 0 and an error below the weights' own.
ACCURACY_LEVEL = 4


class QuantizeLinear(Pass):
    """Gemm -> com.microsoft::MatMulNBits; the token embedding's Gather -> com.microsoft::GatherBlockQuantized.

    embedding: its scheme; None leaves tables as they are. An embedding row is read once per token, so more bits there
    cost no time.
    Requires: moevlm routers are still there. Ensures: of the Gemms with stored weights, only routers' are left.
    """

    def __init__(self, linear: Scheme, embedding: Scheme | None = None) -> None:
        self.linear, self.embedding = linear, embedding

    def apply(self, model: ir.Model) -> int:
        graph = model.graph
        projections = [node for node in graph if is_projection(node)]
        tables = [node for node in graph if self.embedding and _is_embedding(node)]
        weights = [node.inputs[1] for node in projections] + [node.inputs[0] for node in tables]
        for node in projections:
            self._replace(graph, node, self._matmul(graph, node))
        for node in tables:
            self._replace(graph, node, self._gather(graph, node))
        drop_unused(graph, [value for value in weights if value is not None])
        if weights:
            graph.opset_imports[CONTRIB] = 1
        return len(weights)

    def _matmul(self, graph: ir.Graph, node: ir.Node) -> ir.Node:
        x, weight, *bias = node.inputs
        assert weight is not None
        (rows, width), scheme = weight_of(weight).shape, self.linear
        attributes = {
            "N": rows,
            "K": width,
            "bits": scheme.bits,
            "block_size": scheme.block,
            "accuracy_level": ACCURACY_LEVEL,
        }
        inputs = [x, *quantized(graph, weight, scheme), *((None, None, *bias) if bias else ())]
        return ir.node("MatMulNBits", inputs, attributes=attributes, domain=CONTRIB)

    def _gather(self, graph: ir.Graph, node: ir.Node) -> ir.Node:
        table, index = node.inputs
        assert table is not None
        assert self.embedding is not None
        scheme = self.embedding
        attributes = {"bits": scheme.bits, "block_size": scheme.block, "gather_axis": 0, "quantize_axis": 1}
        values, scales = quantized(graph, table, scheme, flat=True)
        return ir.node("GatherBlockQuantized", [values, index, scales], attributes=attributes, domain=CONTRIB)

    @staticmethod
    def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
        ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


def quantized(graph: ir.Graph, weight: ir.Value, scheme: Scheme, flat: bool = False) -> tuple[ir.Value, ir.Value]:
    """New initializers with the integers and the scales of `weight`; flat: blocks are not an axis of their own."""
    parts = Quantized(weight_of(weight), scheme, flat)
    name = f"{weight.name}.int{scheme.bits}"
    values, scales = initializer(name, parts.values), initializer(f"{name}.scales", parts.scales)
    graph.register_initializer(values)  # next to each other, so that they are written one after the other
    graph.register_initializer(scales)
    return values, scales


def _is_embedding(node: ir.Node) -> bool:
    """A row lookup in a stored matrix."""
    table = node.inputs[0] if node.op_type == "Gather" and not node.domain else None
    if table is None or not table.is_initializer() or node.attributes.get_int("axis", 0) != 0:
        return False
    return table.dtype == ir.DataType.FLOAT and len(table.shape or ()) == 2
