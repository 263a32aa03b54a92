"""Attention as TensorRT knows it: standard operators under a mask, the cache of a fixed capacity scattered into."""

from typing import Any

import numpy as np
import onnx_ir as ir

from moevlm.export.graph.op import is_op
from moevlm.export.graph.weights import Constant, initializer
from moevlm.export.passes.base import Pass

FLOAT = int(ir.DataType.FLOAT)
HEADS_FIRST = [0, 2, 1, 3]


class ScatterAttention(Pass):
    """moevlm::CachedAttention -> RotaryEmbedding, TensorScatter, Attention; the mask is made once for all layers.

    Rotation is float32, and so is the scale, on the queries: TensorRT's own scale would be rounded to their dtype.
    Requires: rotary tables in float32; StaticCache. Ensures: no CachedAttention is left; caches may be
    updated in place.
    """

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if is_op(node, "CachedAttention")]
        if not found:
            return 0
        o = _Ops(model.graph, found[0])
        cos, sin, key_cache, _, position = found[0].inputs[3:8]
        rows = o.op("Shape", cos, start=0, end=2)
        sequence = o.op("Squeeze", o.op("Shape", cos, start=1, end=2))
        step = o.op("Range", o.integer(0), sequence, o.integer(1))
        query_position = o.op(
            "Unsqueeze", o.op("Add", o.op("Unsqueeze", position, o.integers(-1)), step), o.integers(1, 3)
        )
        assert key_cache is not None and key_cache.shape is not None
        capacity = key_cache.shape[2]
        assert isinstance(capacity, int)
        key_position = o.array("key_position", np.arange(capacity, dtype=np.int64))
        mask = o.op("LessOrEqual", key_position, query_position)
        for node in found:
            o.before = node
            q, k, v, _, _, key_cache, value_cache, _ = node.inputs
            heads, kv_heads, rotary_dim = (
                node.attributes[name].as_int() for name in ("heads", "kv_heads", "rotary_dim")
            )
            width = o.width(q)
            head_dim = width // heads

            def split(x: ir.Value | None, count: int, head_dim: int = head_dim) -> ir.Value:
                shape = o.op("Concat", rows, o.integers(count, head_dim), axis=0)
                return o.op("Transpose", o.op("Reshape", x, shape), perm=HEADS_FIRST)

            q, k, v = split(q, heads), split(k, kv_heads), split(v, kv_heads)
            q = o.rotated(q, cos, sin, rotary_dim, head_dim**-0.5)
            k = o.rotated(k, cos, sin, rotary_dim)
            keys = o.op("TensorScatter", key_cache, k, position, axis=-2)
            values = o.op("TensorScatter", value_cache, v, position, axis=-2)
            y = o.op("Transpose", o.attention(q, keys, values, mask), perm=HEADS_FIRST)
            o.replace(node, [o.op("Reshape", y, o.integers(-1, width)), keys, values])
        return len(found)


class SegmentMaskAttention(Pass):
    """moevlm::SegmentAttention -> RotaryEmbedding, Attention; the mask, patches squared booleans, is made once.

    Requires: rotary tables in float32. Ensures: no SegmentAttention is left.
    """

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if is_op(node, "SegmentAttention")]
        if not found:
            return 0
        o = _Ops(model.graph, found[0])
        cos, sin, segment = found[0].inputs[3:6]
        mask = o.op("Equal", o.op("Unsqueeze", segment, o.integers(1)), o.op("Unsqueeze", segment, o.integers(0)))
        cos, sin = (o.op("Unsqueeze", table, o.integers(0)) for table in (cos, sin))
        for node in found:
            o.before = node
            heads, width = node.attributes["heads"].as_int(), o.width(node.inputs[0])
            shape = o.integers(1, -1, heads, width // heads)
            q, k, v = (o.op("Transpose", o.op("Reshape", x, shape), perm=HEADS_FIRST) for x in node.inputs[:3])
            q = o.rotated(q, cos, sin, width // heads, (width // heads) ** -0.5)
            k = o.rotated(k, cos, sin, width // heads)
            y = o.op("Transpose", o.attention(q, k, v, mask), perm=HEADS_FIRST)
            o.replace(node, [o.op("Reshape", y, o.integers(-1, width))])
        return len(found)


class _Ops:
    """Makes nodes in front of `before`, and small constants for all of them. Types follow where they are known."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self.graph, self.before = graph, before

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        self.graph.insert_before(self.before, node)
        first = inputs[0]
        if first is not None and op_type in ("Reshape", "Transpose"):
            node.outputs[0].type = first.type
        return node.outputs[0]

    def array(self, name: str, array: np.ndarray) -> ir.Value:
        name = f"attention.{name}"
        if name not in self.graph.initializers:
            self.graph.register_initializer(initializer(name, Constant(array)))
        return self.graph.initializers[name]

    def integer(self, value: int) -> ir.Value:
        return self.array(str(value), np.array(value, np.int64))

    def integers(self, *values: int) -> ir.Value:
        return self.array("_".join(map(str, ("list", *values))), np.array(values, np.int64))

    def rotated(
        self, x: ir.Value, cos: ir.Value | None, sin: ir.Value | None, rotary_dim: int, scale: float = 1.0
    ) -> ir.Value:
        """x [B, heads, S, D] rotated by cos and sin [B, S, rotary_dim / 2] and multiplied, in the dtype of x."""
        assert x.type is not None
        wide = self.op("Cast", x, to=FLOAT)
        turned = self.op("RotaryEmbedding", wide, cos, sin, rotary_embedding_dim=rotary_dim)
        if scale != 1:
            turned = self.op("Mul", turned, self.array(f"scale.{scale:.9g}", np.array(scale, np.float32)))
        return self.op("Cast", turned, to=int(x.type.dtype))

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value) -> ir.Value:
        # Where no kernel of its own has the head size, TensorRT may compute it in steps instead of refusing.
        return self.op("Attention", q, k, v, mask, scale=1.0, TRT_decomposable=1)

    def width(self, x: ir.Value | None) -> int:
        """The fixed last dimension of rows."""
        assert x is not None and x.shape is not None
        width = x.shape[-1]
        assert isinstance(width, int)
        return width

    def replace(self, node: ir.Node, values: list[ir.Value]) -> None:
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [], node.outputs, values)
