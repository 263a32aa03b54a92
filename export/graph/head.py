"""Where the logits of a decoder's graph come from."""

from collections.abc import Iterator

import onnx_ir as ir

_ELEMENTWISE = ("Cast", "Div", "Mul", "Tanh")


def behind_head(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes between the head's product and the output `logits`, such as a softcap's, the last one first."""
    node = _makes_logits(graph)
    while node is not None and node.op_type in _ELEMENTWISE and not node.domain and node.inputs[0] is not None:
        yield node
        node = node.inputs[0].producer()


def head_of(graph: ir.Graph) -> ir.Node | None:
    """The product with the head's weights; None of a graph without an output `logits`."""
    node = _makes_logits(graph)
    for between in behind_head(graph):
        assert between.inputs[0] is not None
        node = between.inputs[0].producer()
    return node


def _makes_logits(graph: ir.Graph) -> ir.Node | None:
    return next((value.producer() for value in graph.outputs if value.name == "logits"), None)
