"""Experts on ONNX Runtime's sparse kernel for quantized weights."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.backends.ort.passes.lower_moe import is_lowerable
from moevlm.export.formats.integers import SMALLEST_GROUP, IntFormat
from moevlm.export.formats.ort_packing import block_form
from moevlm.export.graph.weights import Weight, weight_of
from moevlm.export.passes.base import CONTRIB, NodePass, left, substitute
from moevlm.export.passes.quantize_linear import ACCURACY_LEVEL, quantized
from moevlm.runtime.core.errors import BuildError


class QuantizeExperts(NodePass):
    """com.microsoft::MoE -> com.microsoft::QMoE.

    QMoE always normalizes the weights of the chosen experts, whatever its attribute says, unless they are an input of
    their own: where the softmax over all experts is the weight, that is what it gets.
    Integers of a checkpoint stay as they are. Both matrices of an expert share one group size: the scheme's or the
    checkpoint's, or the largest power of two below it that divides the inner sizes of both. Raises BuildError if 16
    does not.
    """

    domain = CONTRIB

    def __init__(self, scheme: IntFormat) -> None:
        self.scheme = scheme

    def requires(self, model: ir.Model) -> Iterator[str]:
        """LowerMoE has taken all experts that it can."""
        yield from left(model, "MoEExperts to be lowered", is_lowerable)

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No com.microsoft::MoE is left."""
        yield from left(model, "com.microsoft::MoE", self.matches)

    def matches(self, node: ir.Node) -> bool:
        return (node.domain, node.op_type) == (CONTRIB, "MoE")

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        x, logits, gate_up, gate_up_bias, down, down_bias = node.inputs
        assert logits is not None
        assert gate_up is not None
        assert down is not None
        weights = weight_of(gate_up), weight_of(down)
        scheme = shared_scheme(self.scheme, *weights)
        if scheme is None:
            hidden, width = (weight.shape[-1] for weight in weights)
            raise BuildError(
                f"cannot quantize the experts of {down.name}: their sizes are {hidden} and {width} "
                f"(allowed: multiples of {SMALLEST_GROUP})"
            )
        first, second = (quantized(graph, value, scheme, flat=True) for value in (gate_up, down))
        inputs = [x, logits, *first[:2], gate_up_bias, *second[:2], down_bias]
        if scheme.zeros:
            inputs += [None] * 3 + [first[2], second[2]]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if not attributes["normalize_routing_weights"]:
            routing = ir.node("Softmax", [logits], attributes={"axis": -1})
            graph.insert_before(node, routing)
            inputs += [None] * (14 - len(inputs)) + [routing.outputs[0]]
        attributes |= {
            "expert_weight_bits": scheme.bits,
            "block_size": scheme.group_size,
            "accuracy_level": ACCURACY_LEVEL,
            "swiglu_limit": attributes.get("swiglu_limit", float("inf")),
        }
        new = ir.node("QMoE", inputs, attributes=attributes, domain=CONTRIB)
        substitute(graph, node, new)


def shared_scheme(scheme: IntFormat, gate_up: Weight, down: Weight) -> IntFormat | None:
    """One format for both, its groups made smaller until they divide the inner sizes of both; None if 16 does not."""
    fitting = block_form(scheme, gate_up, down).fit(gate_up.shape[-1])
    return fitting and fitting.fit(down.shape[-1])
