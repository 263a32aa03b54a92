"""Projections on ONNX Runtime's kernel for quantized weights."""

import onnx_ir as ir

from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.ort_packing import block_form, packed
from moevlm.export.graph.weights import initializer, weight_of
from moevlm.export.passes.base import CONTRIB, substitute
from moevlm.export.passes.projection_pass import ProjectionPass

# The kernel may round activations to int8 per group: twice the speed of level 0 and an error below the weights' own.
ACCURACY_LEVEL = 4


class QuantizeLinear(ProjectionPass):
    """Gemm -> com.microsoft::MatMulNBits. Integers of a checkpoint stay as they are, whatever the scheme of others."""

    domain = CONTRIB

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        x, weight, *bias = node.inputs
        assert weight is not None
        source = weight_of(weight)
        (rows, width), form = source.shape, block_form(self.scheme, source)
        attributes = {
            "N": rows,
            "K": width,
            "bits": form.bits,
            "block_size": form.group_size,
            "accuracy_level": ACCURACY_LEVEL,
        }
        inputs: list[ir.Value | None] = [x, *quantized(graph, weight, form)]
        if bias:
            inputs += [None] * (5 - len(inputs)) + bias
        new = ir.node("MatMulNBits", inputs, attributes=attributes, domain=CONTRIB)
        substitute(graph, node, new)


def quantized(graph: ir.Graph, weight: ir.Value, form: IntFormat, flat: bool = False) -> tuple[ir.Value, ...]:
    """New initializers with integers and scales of `weight`, and zeros where the form has them.

    flat: groups are not an axis of their own.
    """
    parts = packed(weight_of(weight), form, flat)
    name = f"{weight.name}.{'rows.' if flat else ''}int{form.bits}"  # a tied embedding is also the head
    made = [initializer(name, parts.values)]
    others = zip(("scales", "zeros"), parts.others, strict=False)
    made += [initializer(f"{name}.{part}", other) for part, other in others]
    for value in made:  # next to each other, so that they are written one after the other
        graph.register_initializer(value)
    return tuple(made)
