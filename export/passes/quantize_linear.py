"""Projections on ONNX Runtime's kernel for quantized weights."""

import onnx_ir as ir

from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.ort_packing import packed
from moevlm.export.graph.weights import initializer, weight_of
from moevlm.export.passes.base import CONTRIB, substitute
from moevlm.export.passes.projection_pass import ProjectionPass

# The kernel may round activations to int8 per group: twice the speed of level 0 and an error below the weights' own.
ACCURACY_LEVEL = 4


class QuantizeLinear(ProjectionPass):
    """Gemm -> com.microsoft::MatMulNBits."""

    domain = CONTRIB

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        x, weight, *bias = node.inputs
        assert weight is not None
        rows, width = weight_of(weight).shape
        attributes = {
            "N": rows,
            "K": width,
            "bits": self.scheme.bits,
            "block_size": self.scheme.group_size,
            "accuracy_level": ACCURACY_LEVEL,
        }
        inputs = [x, *quantized(graph, weight, self.scheme), *((None, None, *bias) if bias else ())]
        new = ir.node("MatMulNBits", inputs, attributes=attributes, domain=CONTRIB)
        substitute(graph, node, new)


def quantized(graph: ir.Graph, weight: ir.Value, scheme: IntFormat, flat: bool = False) -> tuple[ir.Value, ir.Value]:
    """New initializers with the integers and the scales of `weight`; flat: groups are not an axis of their own."""
    parts = packed(weight_of(weight), scheme, flat)
    name = f"{weight.name}.{'rows.' if flat else ''}int{scheme.bits}"  # a tied embedding is also the head
    values, scales = initializer(name, parts.values), initializer(f"{name}.scales", *parts.others)
    graph.register_initializer(values)  # next to each other, so that they are written one after the other
    graph.register_initializer(scales)
    return values, scales
