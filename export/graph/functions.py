"""Gives the nodes of domain moevlm their bodies in standard ONNX, opset 24, so that a graph runs as it is."""

import onnx
import onnx_ir as ir

from moevlm.export.graph import (  # noqa: F401 - for ops
    cross_attention,
    gated_delta,
    head_linear,
    moe_functions,
    paged_attention,
    segment_attention,
)
from moevlm.export.graph.op import OPS, node_spec
from moevlm.plugins.ops.spec import DOMAIN, OPSET_VERSION
from moevlm.runtime.core.errors import UnsupportedModelError


def add_functions(model: ir.Model) -> None:
    """Give every moevlm node in `model` its body, and drop the bodies that no node uses.

    Where nodes of one op differ in spec or in their optional inputs, the second and later bodies become overloads "2",
    "3", and so on, which ONNX Runtime runs and onnx's reference evaluator does not. Needs IR version 10.
    """
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    bodies: dict[str, list[_Key]] = {}
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)
        known, wanted = bodies.setdefault(node.op_type, []), _key(node)
        if wanted not in known:
            known.append(wanted)
            function = _body(node, wanted)
            function.overload = _overload(len(known) - 1)
            loaded = ir.serde.deserialize_function(function)
            model.functions[loaded.identifier()] = loaded
        node.overload = _overload(known.index(wanted))
    if bodies:
        model.graph.opset_imports[DOMAIN] = OPSET_VERSION
    else:
        model.graph.opset_imports.pop(DOMAIN, None)


# What a node's body depends on: its spec, and which of its inputs are there.
_Key = tuple[object, tuple[bool, ...]]


def _overload(place: int) -> str:
    return str(place + 1) if place else ""


def _key(node: ir.Node) -> _Key:
    if node.op_type not in OPS:
        known = ", ".join(OPS)
        raise UnsupportedModelError(f"node {node.name}: no op {DOMAIN}::{node.op_type} (known: {known})")
    return node_spec(node), tuple(value is not None for value in node.inputs)


def _body(node: ir.Node, key: _Key) -> onnx.FunctionProto:
    try:
        return OPS[node.op_type].body(*key)
    except ValueError as error:
        raise UnsupportedModelError(f"node {node.name}: {error}") from error
