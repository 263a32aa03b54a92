"""The gated delta rule on moevlm's own CPU kernel."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.graph.gated_delta import GATED_DELTA, INPUTS
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.rearranged import Transposed
from moevlm.export.graph.weights import initializer, weight_of
from moevlm.export.passes.base import NodePass, left, substitute
from moevlm.plugins.ops.spec import attributes
from moevlm.runtime.backends.libraries import DOMAIN as CPU

_WEIGHT = INPUTS.index("conv_weight")


class CpuGatedDelta(NodePass):
    """moevlm::GatedDelta -> moevlm.cpu::GatedDelta, whose convolution's weight lies token by token.

    A state's input and output may be bound to one buffer.
    """

    domain = CPU

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Weights of convolutions are initializers."""
        for node in filter(self.matches, model.graph):
            weight = node.inputs[_WEIGHT]
            if weight is None or not weight.is_initializer():
                yield f"the convolution's weight of {node.outputs[0].name} is not stored"

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::GatedDelta is left."""
        yield from left(model, "moevlm::GatedDelta", self.matches)

    def matches(self, node: ir.Node) -> bool:
        return is_op(node, GATED_DELTA)

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        inputs = list(node.inputs)
        weight = inputs[_WEIGHT]
        assert weight is not None
        inputs[_WEIGHT] = by_token = initializer(f"{weight.name}.by_token", Transposed(weight_of(weight)))
        graph.register_initializer(by_token)
        told = attributes(node_spec(node))
        substitute(graph, node, ir.node(GATED_DELTA, inputs, told, domain=CPU, num_outputs=len(node.outputs)))
