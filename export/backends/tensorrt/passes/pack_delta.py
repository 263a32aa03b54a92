"""All projections of a layer of the gated delta rule as one."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.graph.gated_delta import GATED_DELTA
from moevlm.export.graph.op import is_op
from moevlm.export.passes.base import Pass
from moevlm.export.passes.pack_projections import has_stored_weight, pack


class PackDelta(Pass):
    """qkv, a, b and whatever else is a Gemm of their input, the gate z -> one Gemm, a Split in this order.

    The plugin reads its part of a row where it lies, and z is read by what norms and gates the result.
    """

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No other Gemm reads what qkv is made of."""
        for nodes in _groups(model.graph):
            yield f"{nodes[0].outputs[0].name} and {nodes[1].outputs[0].name} share their input"

    def apply(self, model: ir.Model) -> int:
        groups = _groups(model.graph)
        for nodes in groups:
            pack(model.graph, nodes)
        return len(groups)


def _groups(graph: ir.Graph) -> list[list[ir.Node]]:
    """For each node of the rule its three Gemms, where they are such and without a bias, and the others."""
    found = []
    for node in graph:
        if not is_op(node, GATED_DELTA):
            continue
        own = [made for value in node.inputs[:3] if value is not None and (made := value.producer()) is not None]
        if len(set(own)) == 3 and all(_is_plain(made) and made.inputs[0] is own[0].inputs[0] for made in own):
            rows = own[0].inputs[0]
            assert rows is not None
            others = [user for user in rows.consumers() if user not in own and _is_plain(user)]
            found.append(own + [user for user in others if user.inputs[0] is rows])
    return found


def _is_plain(node: ir.Node) -> bool:
    return has_stored_weight(node) and len(node.inputs) == 2
