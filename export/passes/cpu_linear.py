"""Projections on moevlm's own CPU kernel."""

import onnx_ir as ir

from moevlm.export.cpu_packing import PackedRows
from moevlm.export.passes.base import Pass
from moevlm.export.passes.pack_projections import is_projection
from moevlm.export.quantization import Scheme
from moevlm.export.weights import initializer, weight_of

CPU = "moevlm.cpu"


class CpuLinear(Pass):
    """Gemm -> moevlm.cpu::Linear, whose weight lies in the file as the kernel reads it.

    Requires: moevlm routers are still there. Ensures: of the Gemms with stored weights, only routers' are left.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if is_projection(node)]
        for node in found:
            self._replace(model.graph, node)
        if found:
            model.graph.opset_imports[CPU] = 1
        return len(found)

    def _replace(self, graph: ir.Graph, node: ir.Node) -> None:
        x, weight, *bias = node.inputs
        assert weight is not None
        rows, width = weight_of(weight).shape
        packed = initializer(f"{weight.name}.int{self.scheme.bits}", PackedRows(weight_of(weight), self.scheme))
        graph.register_initializer(packed)
        attributes = {"N": rows, "K": width, "bits": self.scheme.bits, "block_size": self.scheme.block}
        new = ir.node("Linear", [x, packed, *bias], attributes=attributes, domain=CPU)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
