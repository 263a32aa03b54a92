"""A matrix for each head as one batched product."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.graph.builder import Builder
from moevlm.export.graph.head_linear import HEAD_LINEAR
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.rearranged import swap_last
from moevlm.export.graph.weights import initializer, weight_of
from moevlm.export.passes.base import Pass, left


class LowerHeadLinear(Pass):
    """moevlm::HeadLinear -> MatMul of heads first, between two changes of the order of axes.

    The weight is turned as it is written, [heads, K, N]: nothing turns it in an engine.
    """

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Weights are initializers."""
        yield from unstored(model)

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::HeadLinear is left."""
        yield from left(model, "moevlm::HeadLinear", is_head_linear)

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if is_head_linear(node)]
        for node in found:
            _replace(model.graph, node)
        return len(found)


def is_head_linear(node: ir.Node) -> bool:
    return is_op(node, HEAD_LINEAR)


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    x, weight = node.inputs
    assert weight is not None
    b = Builder(graph, node, "heads")
    turned = initializer(f"{weight.name}.turned", swap_last(weight_of(weight)))
    graph.register_initializer(turned)
    split = b.op("Reshape", x, b.integers(0, node_spec(node).heads, -1))
    products = b.op("MatMul", b.op("Transpose", split, perm=[1, 0, 2]), turned)
    b.replace(node, [b.op("Reshape", b.op("Transpose", products, perm=[1, 0, 2]), b.integers(0, -1))])


def unstored(model: ir.Model) -> Iterator[str]:
    """A line for each moevlm::HeadLinear whose weight is not stored."""
    for node in filter(is_head_linear, model.graph):
        weight = node.inputs[1]
        if weight is None or not weight.is_initializer():
            yield f"the weight of {node.outputs[0].name} is not stored"
