"""Cached attention on ONNX Runtime's grouped-query kernel."""

from typing import Any

import numpy as np
import onnx_ir as ir

from moevlm.export.graph.weights import Constant, initializer
from moevlm.export.passes.base import CONTRIB, Pass
from moevlm.plugins.ops.spec import DOMAIN


class LowerAttention(Pass):
    """moevlm::CachedAttention -> RotaryEmbedding + com.microsoft::GroupQueryAttention, writing into the cache it reads.

    Requires: nothing. Ensures: no CachedAttention is left; a cache's input and output may be bound to one buffer.
    Rotation stays outside the kernel: its own cannot take a table per sequence in the first prompt of a batch.
    """

    def apply(self, model: ir.Model) -> int:
        found = [n for n in model.graph if n.domain == DOMAIN and n.op_type == "CachedAttention"]
        if not found:
            return 0
        rewriter = _Rewriter(model.graph, found[0])
        for node in found:
            rewriter.replace(node)
        model.graph.opset_imports[CONTRIB] = 1
        return len(found)


class _Rewriter:
    """What all layers share is computed once, in front of the first: packed shapes and the kernel's lengths."""

    def __init__(self, graph: ir.Graph, first: ir.Node) -> None:
        self.graph = graph
        cos, position = first.inputs[3], first.inputs[7]
        sequence = self._op(first, "Shape", cos, start=1, end=2)
        end = self._op(first, "Add", position, sequence)
        self.packed = self._op(
            first, "Concat", self._op(first, "Shape", cos, start=0, end=2), self._constant("minus_one", [-1]), axis=0
        )
        # Every row counts as a full chunk: padding is overwritten by the next step and causality hides it until then.
        int32 = int(ir.DataType.INT32)
        self.last = self._op(first, "Cast", self._op(first, "Sub", end, self._constant("one", [1])), to=int32)
        self.total = self._op(first, "Cast", self._op(first, "ReduceMax", end, keepdims=0), to=int32)
        batch = self._op(first, "Shape", position)
        self.query = self._op(first, "Cast", self._op(first, "Expand", sequence, batch), to=int32)

    def replace(self, node: ir.Node) -> None:
        q, k, v, cos, sin, key_cache, value_cache, _ = node.inputs
        heads, kv_heads, rotary_dim = (node.attributes[a].as_int() for a in ("heads", "kv_heads", "rotary_dim"))
        q, k, v = (self._op(node, "Reshape", t, self.packed) for t in (q, k, v))
        q = self._op(node, "RotaryEmbedding", q, cos, sin, num_heads=heads, rotary_embedding_dim=rotary_dim)
        k = self._op(node, "RotaryEmbedding", k, cos, sin, num_heads=kv_heads, rotary_embedding_dim=rotary_dim)
        inputs = [q, k, v, key_cache, value_cache, self.last, self.total, *[None] * 9, self.query]
        attention = ir.node(
            "GroupQueryAttention",
            inputs,
            attributes={"num_heads": heads, "kv_num_heads": kv_heads},
            domain=CONTRIB,
            num_outputs=3,
        )
        self.graph.insert_before(node, attention)
        assert key_cache is not None
        assert key_cache.shape is not None
        head_dim = key_cache.shape[3]
        assert isinstance(head_dim, int)  # batch and capacity are open, head_dim is not
        width = head_dim * heads
        y = self._op(node, "Reshape", attention.outputs[0], self._constant(f"rows_{width}", [-1, width]))
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [], node.outputs, [y, *attention.outputs[1:]])

    def _constant(self, name: str, value: list[int]) -> ir.Value:
        name = f"attention.{name}"
        if name not in self.graph.initializers:
            self.graph.register_initializer(initializer(name, Constant(np.array(value, np.int64))))
        return self.graph.initializers[name]

    def _op(self, before: ir.Node, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        self.graph.insert_before(before, node)
        return node.outputs[0]
