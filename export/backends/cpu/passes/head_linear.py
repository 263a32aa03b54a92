"""A matrix for each head on moevlm's own CPU kernel."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.backends.cpu.passes.linear import packing_attributes
from moevlm.export.formats.cpu_packing import PackedExperts
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.stored import shared_form
from moevlm.export.graph.head_linear import HEAD_LINEAR
from moevlm.export.graph.weights import Weight, initializer, weight_of
from moevlm.export.passes.base import NodePass, left, substitute
from moevlm.export.passes.lower_head_linear import is_head_linear, unstored
from moevlm.runtime.backends.libraries import DOMAIN as CPU


class CpuHeadLinear(NodePass):
    """moevlm::HeadLinear -> moevlm.cpu::HeadLinear, whose weight lies in the file as the kernel reads it."""

    domain = CPU

    def __init__(self, scheme: IntFormat) -> None:
        self.scheme = scheme

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Weights are initializers."""
        yield from unstored(model)

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::HeadLinear is left."""
        yield from left(model, "moevlm::HeadLinear", self.matches)

    def matches(self, node: ir.Node) -> bool:
        return is_head_linear(node)

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        x, weight = node.inputs
        assert weight is not None
        source = weight_of(weight)
        heads, rows, width = source.shape
        form = head_form(self.scheme, source)
        packed = initializer(f"{weight.name}.int{form.bits}", PackedExperts(source, form, interleaved=False))
        graph.register_initializer(packed)
        attributes = {"heads": heads, "N": rows, "K": width, **packing_attributes(form)}
        substitute(graph, node, ir.node(HEAD_LINEAR, [x, packed], attributes, domain=CPU))


def head_form(scheme: IntFormat, weight: Weight) -> IntFormat:
    """Of a weight [heads, N, K]. K may be smaller than a group of the scheme, which would be filled up."""
    return shared_form(scheme.fit(weight.shape[-1]) or scheme, weight)
