"""Several projections of one input as one."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from moevlm.export.graph.builder import Builder
from moevlm.export.graph.codes import CodeForm
from moevlm.export.graph.gated_delta import GATED_DELTA, INPUTS
from moevlm.export.graph.moe_functions import routes
from moevlm.export.graph.moved_codes import coded
from moevlm.export.graph.op import is_op
from moevlm.export.graph.weights import Concat, initializer, weight_of
from moevlm.export.passes.base import Pass, replaced_deciders

_GATES = tuple(map(INPUTS.index, "ab"))


class PackProjections(Pass):
    """Gemms on the same rows (q, k and v; gate and up; in a parallel layer all) -> one Gemm on joined weights, a Split.

    The input is read once and the work handed to the threads once. Router logits and gates, of states and of shared
    experts, stay apart: they are never quantized. So do weights that a checkpoint holds in different codes, which would
    be lost.
    readers: with some, only Gemms that the same node of one of these moevlm ops reads, and nothing else does.
    """

    def __init__(self, *readers: str) -> None:
        self.readers = readers

    def requires(self, model: ir.Model) -> Iterator[str]:
        """The moevlm routers and gated states are still there."""
        yield from replaced_deciders(model)

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """Gemms that share an input differ in having a bias or in their codes, or one is no projection."""
        for nodes in _groups(model.graph, self.readers):
            yield f"{nodes[0].outputs[0].name} and {nodes[1].outputs[0].name} share their input"

    def apply(self, model: ir.Model) -> int:
        packed = _groups(model.graph, self.readers)
        for nodes in packed:
            pack(model.graph, nodes)
        return len(packed)


def whole(*parts: ir.Value) -> ir.Value | None:
    """The value that was split into exactly `parts`, if they come from one Split."""
    split = parts[0].producer()
    if split is None or split.op_type != "Split" or tuple(split.outputs) != parts:
        return None
    return split.inputs[0]


def _groups(graph: ir.Graph, readers: tuple[str, ...]) -> list[list[ir.Node]]:
    """Projections of one input and reader, all with a bias or all without, where there are several."""
    groups: dict[tuple[object, ...], list[ir.Node]] = defaultdict(list)
    for node in graph:
        reader = _reader(node, readers)
        if has_stored_weight(node) if reader else is_projection(node) and not readers:
            groups[node.inputs[0], len(node.inputs) > 2, reader, None if reader else _form(node)].append(node)
    return [nodes for nodes in groups.values() if len(nodes) > 1]


def _form(node: ir.Node) -> CodeForm | None:
    """Of the codes that a checkpoint holds the weight in; None for floats."""
    assert node.inputs[1] is not None
    own = coded(weight_of(node.inputs[1]))
    return None if own is None else replace(own.form, block_rows=1)


def _reader(node: ir.Node, readers: tuple[str, ...]) -> ir.Node | None:
    """The only node that reads what `node` makes, if it is of one of the ops `readers`."""
    users = node.outputs[0].consumers()
    return users[0] if len(users) == 1 and any(is_op(users[0], op_type) for op_type in readers) else None


def has_stored_weight(node: ir.Node) -> bool:
    """A Gemm with a stored weight [out, in]."""
    if node.op_type != "Gemm" or node.domain or node.attributes.get_int("transB", 0) != 1:
        return False
    weight = node.inputs[1]
    return weight is not None and weight.is_initializer()


def is_projection(node: ir.Node) -> bool:
    """A Gemm with a stored weight that makes neither a router's logits nor a gate, of a state or of a whole row."""
    if not has_stored_weight(node) or (weight := node.inputs[1]) is None:
        return False
    out = node.outputs[0]
    return weight_of(weight).shape[0] > 1 and not routes(out) and not any(_is_gate(*use) for use in out.uses())


def _is_gate(user: ir.Node, place: int) -> bool:
    """Whether input `place` of a node decides more than it costs: what a state keeps."""
    return is_op(user, GATED_DELTA) and place in _GATES


def pack(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Gemms on the same rows, all with a bias or all without -> one, and a Split behind it, in their order."""
    first, joined = nodes[0], []
    b = Builder(graph, first, "projections")
    for i in range(1, len(first.inputs)):
        values = [value for node in nodes if (value := node.inputs[i]) is not None]
        name = "+".join(str(value.name) for value in values)
        joined.append(initializer(name, Concat([weight_of(value) for value in values])))
        graph.register_initializer(joined[-1])
    sizes = [weight_of(value).shape[0] for node in nodes if (value := node.inputs[1]) is not None]
    rows = b.op("Gemm", first.inputs[0], *joined, transB=1)
    outputs = b.ops("Split", rows, b.integers(*sizes), outputs=len(nodes), axis=1)
    old = [node.outputs[0] for node in nodes]
    ir.convenience.replace_nodes_and_values(graph, first, nodes, [], old, outputs)
