"""Attention as TensorRT knows it: standard operators under a mask, the cache of a fixed capacity scattered into."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from moevlm.export.backends.tensorrt.passes.rectangular_steps import cache_position, paged, rectangle
from moevlm.export.graph.builder import Builder, width
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.paged_attention import PAGED_ATTENTION, caches, inputs_of
from moevlm.export.passes.base import Pass, left
from moevlm.plugins.ops.spec import AttentionSpec
from moevlm.runtime.core.errors import BuildError

FLOAT, INT64 = int(ir.DataType.FLOAT), int(ir.DataType.INT64)
FAR = 2**31 - 1  # the end of any axis
HEADS_FIRST = [0, 2, 1, 3]


class ScatterAttention(Pass):
    """moevlm::PagedAttention -> norms, RotaryEmbedding, TensorScatter, Attention; a mask is made once for all layers.

    Rotation is float32, and so is the scale, on the queries: TensorRT's own scale would be rounded to their dtype.
    Raises BuildError for keys that do not start with the rotated dimensions, values in keys, softcap and sinks.
    """

    def requires(self, model: ir.Model) -> Iterator[str]:
        """RectangularSteps and StaticCache have run; rotary tables are float32."""
        yield from paged(model)
        for node in (node for node in model.graph if is_op(node, PAGED_ATTENTION)):
            for table in node.inputs[3:5]:
                if table is not None and table.dtype not in (None, ir.DataType.FLOAT):
                    yield f"the rotary table {table.name} is {table.dtype}"

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No PagedAttention is left."""
        yield from left(model, "PagedAttention", lambda node: is_op(node, PAGED_ATTENTION))

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if is_op(node, PAGED_ATTENTION)]
        if not found:
            return 0
        o = _Ops(model.graph, found[0], "attention")
        specs = [_expressible(node) for node in found]
        masks = _CausalMasks(o, found[0], {spec.window for spec in specs})
        for node, spec in zip(found, specs, strict=True):
            o.before = node
            q, k, v, cos, sin, key_cache, value_cache, _, _, _, q_norm, k_norm, _ = inputs_of(node)
            if spec.rotary_dim:
                cos, sin = rectangle(cos), rectangle(sin)
            dim = width(q) // spec.heads

            def split(x: ir.Value | None, heads: int, norm: ir.Value | None, epsilon: float = spec.epsilon) -> ir.Value:
                shape = o.op("Concat", masks.rows, o.integers(heads, width(x) // heads), axis=0)
                cut = o.op("Reshape", x, shape)
                if norm is not None:
                    cut = o.op("RMSNormalization", cut, norm, axis=-1, epsilon=epsilon)
                return o.op("Transpose", cut, perm=HEADS_FIRST)

            q, k, v = split(q, spec.heads, q_norm), split(k, spec.kv_heads, k_norm), split(v, spec.kv_heads, None)
            q = o.rotated(q, cos, sin, spec.rotary_dim, spec.scale or dim**-0.5)
            k = o.rotated(k, cos, sin, spec.rotary_dim)
            keys = o.op("TensorScatter", key_cache, k, masks.position, axis=-2)
            values = o.op("TensorScatter", value_cache, v, masks.position, axis=-2)
            y = o.op("Transpose", o.attention(q, keys, values, masks.by_window[spec.window]), perm=HEADS_FIRST)
            o.replace(node, [o.op("Reshape", y, o.integers(-1, width(node.outputs[0]))), keys, values])
        return len(found)


class _CausalMasks:
    """Which keys queries see, [batch, 1, sequence, capacity], each made once, in front of the first layer.

    by_window: tokens that a query sees, itself included, 0 for all before it. rows: [batch, sequence], the shape.
    position: cache_position.
    """

    def __init__(self, o: "_Ops", first: ir.Node, windows: set[int]) -> None:
        self.position = cache_position(first)
        tokens = o.graph.inputs[0]
        self.rows = o.op("Shape", tokens, start=0, end=2)
        step = o.op("Range", o.integer(0), o.op("Squeeze", o.op("Shape", tokens, start=1, end=2)), o.integer(1))
        column = o.op("Unsqueeze", self.position, o.integers(-1))
        query = o.op("Unsqueeze", o.op("Add", column, step), o.integers(1, 3))
        shape = caches(first)[0][0].shape
        capacity = shape[2] if shape is not None else None
        assert isinstance(capacity, int)
        key = np.arange(capacity, dtype=np.int64)
        causal = o.op("LessOrEqual", o.array("key_position", key), query)
        self.by_window = {0: causal}
        for window in sorted(windows - {0}):
            near = o.op("Greater", o.array(f"key_end.{window}", key + window), query)
            self.by_window[window] = o.op("And", causal, near)


def _expressible(node: ir.Node) -> AttentionSpec:
    """The node's spec. Raises BuildError, by name, for what TensorRT's attention cannot compute."""
    spec: AttentionSpec = node_spec(node)
    for name, value in (
        ("rotary_start", spec.rotary_start),
        ("value_in_key", int(spec.value_in_key)),
        ("softcap", spec.softcap),
        ("sinks", int(inputs_of(node).sinks is not None)),
    ):
        if value:
            raise BuildError(f"TensorRT's attention cannot compute {name} = {value} (allowed: 0)")
    return spec


class SegmentMaskAttention(Pass):
    """moevlm::SegmentAttention -> RotaryEmbedding, Attention; the mask, patches squared booleans, is made once."""

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Rotary tables are float32."""
        for node in (node for node in model.graph if is_op(node, "SegmentAttention")):
            for table in node.inputs[3:5]:
                if table is not None and table.dtype not in (None, ir.DataType.FLOAT):
                    yield f"the rotary table {table.name} is {table.dtype}"

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No SegmentAttention is left."""
        yield from left(model, "SegmentAttention", lambda node: is_op(node, "SegmentAttention"))

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if is_op(node, "SegmentAttention")]
        if not found:
            return 0
        o = _Ops(model.graph, found[0], "attention")
        q, _, _, cos, sin, image_start = found[0].inputs
        starts = o.op("Cast", image_start, to=INT64)
        ends = o.op("Slice", starts, o.integers(1), o.integers(FAR))
        patch = o.op("Range", o.integer(0), o.op("Squeeze", o.op("Shape", q, start=0, end=1)), o.integer(1))
        ended = o.op("GreaterOrEqual", o.op("Unsqueeze", patch, o.integers(1)), ends)
        image = o.op("ReduceSum", o.op("Cast", ended, to=INT64), o.integers(1), keepdims=0)
        mask = o.op("Equal", o.op("Unsqueeze", image, o.integers(1)), o.op("Unsqueeze", image, o.integers(0)))
        cos, sin = (o.op("Unsqueeze", table, o.integers(0)) for table in (cos, sin))
        for node in found:
            o.before = node
            heads, size = node.attributes["heads"].as_int(), width(node.inputs[0])
            shape = o.integers(1, -1, heads, size // heads)
            q, k, v = (o.op("Transpose", o.op("Reshape", x, shape), perm=HEADS_FIRST) for x in node.inputs[:3])
            q = o.rotated(q, cos, sin, size // heads, (size // heads) ** -0.5)
            k = o.rotated(k, cos, sin, size // heads)
            y = o.op("Transpose", o.attention(q, k, v, mask), perm=HEADS_FIRST)
            o.replace(node, [o.op("Reshape", y, o.integers(-1, size))])
        return len(found)


class _Ops(Builder):
    """A builder whose types follow where they are known."""

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        made = super().op(op_type, *inputs, domain=domain, **attributes)
        if inputs[0] is not None and op_type in ("Reshape", "Transpose", "RMSNormalization"):
            made.type = inputs[0].type
        return made

    def rotated(
        self, x: ir.Value, cos: ir.Value | None, sin: ir.Value | None, rotary_dim: int, scale: float = 1.0
    ) -> ir.Value:
        """x [B, heads, S, D] rotated by cos and sin [B, S, rotary_dim / 2], if any, and multiplied, in its dtype."""
        assert x.type is not None
        turned = self.op("Cast", x, to=FLOAT)
        if rotary_dim:
            turned = self.op("RotaryEmbedding", turned, cos, sin, rotary_embedding_dim=rotary_dim)
        if scale != 1:
            turned = self.op("Mul", turned, self.array(f"scale.{scale:.9g}", np.array(scale, np.float32)))
        return self.op("Cast", turned, to=int(x.type.dtype))

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value) -> ir.Value:
        # Where no kernel of its own has the head size, TensorRT may compute it in steps instead of refusing.
        return self.op("Attention", q, k, v, mask, scale=1.0, TRT_decomposable=1)
