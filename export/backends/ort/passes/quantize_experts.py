"""Experts on ONNX Runtime's sparse kernel for quantized weights."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.backends.ort.passes.lower_moe import is_lowerable
from moevlm.export.formats.integers import SMALLEST_GROUP, IntFormat
from moevlm.export.graph.weights import weight_of
from moevlm.export.passes.base import CONTRIB, NodePass, left, substitute
from moevlm.export.passes.quantize_linear import ACCURACY_LEVEL, quantized
from moevlm.runtime.core.errors import BuildError


class QuantizeExperts(NodePass):
    """com.microsoft::MoE -> com.microsoft::QMoE.

    QMoE always normalizes the weights of the chosen experts, whatever its attribute says, unless they are an input of
    their own: where the softmax over all experts is the weight, that is what it gets.
    Both matrices of an expert share one group size: the scheme's, or the largest power of two below it that divides the
    inner sizes of both. Raises BuildError if 16 does not.
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
        hidden, width = (weight_of(value).shape[-1] for value in (gate_up, down))
        scheme = shared_scheme(self.scheme, hidden, width)
        if scheme is None:
            raise BuildError(
                f"cannot quantize the experts of {down.name}: their sizes are {hidden} and {width} "
                f"(allowed: multiples of {SMALLEST_GROUP})"
            )
        inputs = [x, logits, *quantized(graph, gate_up, scheme, flat=True), gate_up_bias]
        inputs += [*quantized(graph, down, scheme, flat=True), down_bias]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if not attributes["normalize_routing_weights"]:
            weights = ir.node("Softmax", [logits], attributes={"axis": -1})
            graph.insert_before(node, weights)
            inputs += [None] * 6 + [weights.outputs[0]]
        attributes |= {
            "expert_weight_bits": scheme.bits,
            "block_size": scheme.group_size,
            "accuracy_level": ACCURACY_LEVEL,
            "swiglu_limit": attributes.get("swiglu_limit", float("inf")),
        }
        new = ir.node("QMoE", inputs, attributes=attributes, domain=CONTRIB)
        substitute(graph, node, new)


def shared_scheme(scheme: IntFormat, hidden: int, width: int) -> IntFormat | None:
    """The scheme, its groups made smaller until it divides the inner sizes of both matrices; None if 16 does not."""
    fitting = scheme.fit(hidden)
    return fitting and fitting.fit(width)
