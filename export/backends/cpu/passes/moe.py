"""Router and experts on moevlm's own CPU kernels."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.backends.cpu.passes.linear import packing_attributes
from moevlm.export.formats.cpu_packing import PackedExperts
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.stored import cpu_form
from moevlm.export.graph.moe_functions import EXPERTS, ROUTER
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.weights import initializer, weight_of
from moevlm.export.passes.base import NodePass, left, substitute
from moevlm.runtime.backends.libraries import DOMAIN as CPU


class CpuMoE(NodePass):
    """moevlm::MoERouter -> moevlm.cpu::MoERouter, moevlm::MoEExperts -> moevlm.cpu::MoEExperts, one for one.

    Every variant of both ops has a kernel, and the routing stays a value of the graph. Integers and fp4 of a checkpoint
    stay as they are, whatever the scheme of the others.
    """

    domain = CPU

    def __init__(self, scheme: IntFormat) -> None:
        self.scheme = scheme

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Expert weights are initializers."""
        for node in (node for node in model.graph if is_op(node, EXPERTS)):
            if not all(value is not None and value.is_initializer() for value in node.inputs[3:5]):
                yield f"the weights of {node.outputs[0].name} are not all stored"

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::MoERouter and no moevlm::MoEExperts is left."""
        yield from left(model, "of moevlm's MoE", self.matches)

    def matches(self, node: ir.Node) -> bool:
        return is_op(node, ROUTER) or is_op(node, EXPERTS)

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        if is_op(node, ROUTER):
            node.domain = CPU
            return
        x, index, weight, gate_up, down, *biases = node.inputs
        assert gate_up is not None
        assert down is not None
        gated = node_spec(node).gated
        _, hidden, width = weight_of(down).shape
        form, packed = cpu_form(self.scheme, weight_of(gate_up), weight_of(down)), []
        for value, interleaved in ((gate_up, gated), (down, False)):
            recipe = PackedExperts(weight_of(value), form, interleaved)
            packed.append(initializer(f"{value.name}.{form.name}", recipe))
            graph.register_initializer(packed[-1])
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes |= {"hidden": hidden, "width": width, **packing_attributes(form)}
        new = ir.node(EXPERTS, [x, index, weight, *packed, *biases], attributes=attributes, domain=CPU)
        substitute(graph, node, new)
