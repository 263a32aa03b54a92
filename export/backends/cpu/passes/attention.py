"""Cached attention on moevlm's own CPU kernel."""

import onnx_ir as ir
from onnx_ir import tape

from moevlm.export.graph.op import is_op
from moevlm.export.passes.base import NodePass
from moevlm.runtime.backends.libraries import DOMAIN as CPU
from moevlm.runtime.core.states import SCALE_BYTES


class CpuAttention(NodePass):
    """Norms of q and k + moevlm::CachedAttention -> moevlm.cpu::CachedAttention on rows of q, k and v side by side.

    The kernel norms, rotates and stores in one pass, and reads each cached key once for all heads that share it. A
    cache's input and output may be bound to one buffer. int8_cache: a row of head_dim values becomes int8, followed by
    its own float32 scale.
    Requires: nothing; where q, k and v come from one Split, its input is used as it is (PackProjections).
    Ensures: no moevlm::CachedAttention is left.
    """

    domain = CPU

    def __init__(self, int8_cache: bool = False) -> None:
        self.int8_cache = int8_cache

    def matches(self, node: ir.Node) -> bool:
        return is_op(node, "CachedAttention")

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        q, k, v, cos, sin, key_cache, value_cache, position = node.inputs
        assert q is not None
        assert k is not None
        assert v is not None
        attributes: dict[str, int | float] = {
            name: node.attributes[name].as_int() for name in ("heads", "kv_heads", "rotary_dim")
        }
        gains: list[ir.Value | None] = []
        q_norm, k_norm = _head_norm(q), _head_norm(k)
        if q_norm and k_norm:
            q, k = _rows(q_norm), _rows(k_norm)
            gains = [q_norm.inputs[1], k_norm.inputs[1]]
            attributes["epsilon"] = q_norm.attributes["epsilon"].as_float()
        t = tape.Tape()
        qkv = _whole(q, k, v) or t.op("Concat", [q, k, v], {"axis": 1})
        inputs = [qkv, cos, sin, key_cache, value_cache, position, *gains]
        outputs = t.op_multi_out("CachedAttention", inputs, attributes, domain=CPU, num_outputs=3)
        ir.convenience.replace_nodes_and_values(graph, node, [node], t.nodes, node.outputs, outputs)
        if self.int8_cache:
            for cache in (key_cache, value_cache, *outputs[1:]):
                _make_int8(cache)


def _head_norm(x: ir.Value) -> ir.Node | None:
    """The norm of each head of x [T, heads * D], which stands between two Reshapes."""
    flat = x.producer()
    norm = flat.inputs[0].producer() if flat and flat.op_type == "Reshape" and flat.inputs[0] else None
    return norm if norm and norm.op_type == "RMSNormalization" and not norm.domain else None


def _rows(norm: ir.Node) -> ir.Value:
    """What `_head_norm` norms, before it was cut into heads."""
    heads = norm.inputs[0]
    split = heads.producer() if heads else None
    assert split is not None
    assert split.op_type == "Reshape"
    assert split.inputs[0] is not None
    return split.inputs[0]


def _whole(*parts: ir.Value) -> ir.Value | None:
    """The value that was split into exactly `parts`, if they come from one Split."""
    split = parts[0].producer()
    if split is None or split.op_type != "Split" or tuple(split.outputs) != parts:
        return None
    return split.inputs[0]


def _make_int8(cache: ir.Value | None) -> None:
    assert cache is not None
    assert cache.shape is not None
    *outer, head_dim = cache.shape
    cache.shape = ir.Shape([*outer, head_dim + SCALE_BYTES])
    cache.type = ir.TensorType(ir.DataType.INT8)
