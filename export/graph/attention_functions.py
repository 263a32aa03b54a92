"""`moevlm::CachedAttention` and `moevlm::SegmentAttention` in standard ONNX, as function bodies.

What a target cannot do better runs as written here: RotaryEmbedding, TensorScatter, Attention (opset 24).
"""

from dataclasses import dataclass

from onnx import FunctionProto, parser

from moevlm.export.graph.op import Op, register
from moevlm.plugins.ops.spec import SegmentAttentionSpec


@dataclass(frozen=True)
class CachedAttentionSpec:
    """Field names are the op's attribute names."""

    heads: int
    kv_heads: int
    rotary_dim: int


_HEADER = '<domain: "moevlm", opset_import: ["" : 24]>'


def cached_attention_function() -> FunctionProto:
    """Rotate, write into the cache, attend causally; inputs and outputs as `export.modules.ops.cached_attention`."""
    return parser.parse_function(
        _HEADER
        + """
CachedAttention <heads, kv_heads, rotary_dim> (q, k, v, cos, sin, key_cache, value_cache, cache_position)
    => (y, key_cache_out, value_cache_out)
{
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    minus_one = Constant <value_ints: ints = [-1]> ()
    heads_scalar = Constant <value_int: int = @heads> ()
    kv_heads_scalar = Constant <value_int: int = @kv_heads> ()
    first = Constant <value_ints: ints = [0]> ()
    last_two = Constant <value_ints: ints = [1, 3]> ()
    heads_1 = Unsqueeze (heads_scalar, first)
    kv_heads_1 = Unsqueeze (kv_heads_scalar, first)

    batch_sequence = Shape <start: int = 0, end: int = 2> (cos)
    packed_shape = Concat <axis: int = 0> (batch_sequence, minus_one)
    q_shape = Concat <axis: int = 0> (batch_sequence, heads_1, minus_one)
    kv_shape = Concat <axis: int = 0> (batch_sequence, kv_heads_1, minus_one)

    q_packed = Reshape (q, packed_shape)
    k_packed = Reshape (k, packed_shape)
    q_rotated = RotaryEmbedding <num_heads: int = @heads, rotary_embedding_dim: int = @rotary_dim>
        (q_packed, cos, sin)
    k_rotated = RotaryEmbedding <num_heads: int = @kv_heads, rotary_embedding_dim: int = @rotary_dim>
        (k_packed, cos, sin)
    q_split = Reshape (q_rotated, q_shape)
    k_split = Reshape (k_rotated, kv_shape)
    v_split = Reshape (v, kv_shape)
    q_heads = Transpose <perm: ints = [0, 2, 1, 3]> (q_split)
    k_heads = Transpose <perm: ints = [0, 2, 1, 3]> (k_split)
    v_heads = Transpose <perm: ints = [0, 2, 1, 3]> (v_split)

    key_cache_out = TensorScatter <axis: int = 2> (key_cache, k_heads, cache_position)
    value_cache_out = TensorScatter <axis: int = 2> (value_cache, v_heads, cache_position)

    sequence_1 = Shape <start: int = 1, end: int = 2> (cos)
    sequence = Squeeze (sequence_1)
    capacity_1 = Shape <start: int = 2, end: int = 3> (key_cache)
    capacity = Squeeze (capacity_1)
    step = Range (zero, sequence, one)
    key_position = Range (zero, capacity, one)
    start = Unsqueeze (cache_position, minus_one)
    position = Add (start, step)
    query_position = Unsqueeze (position, last_two)
    mask = LessOrEqual (key_position, query_position)
    y_heads = Attention (q_heads, key_cache_out, value_cache_out, mask)
    y_split = Transpose <perm: ints = [0, 2, 1, 3]> (y_heads)
    rows = Shape <start: int = 0, end: int = 1> (q)
    y_shape = Concat <axis: int = 0> (rows, minus_one)
    y = Reshape (y_split, y_shape)
}
"""
    )


def segment_attention_function() -> FunctionProto:
    """Rotate, attend inside each segment; inputs and output as `export.modules.ops.segment_attention`."""
    return parser.parse_function(
        _HEADER
        + """
SegmentAttention <heads> (q, k, v, cos, sin, segment_id) => (y)
{
    first = Constant <value_ints: ints = [0]> ()
    q_packed = Unsqueeze (q, first)
    k_packed = Unsqueeze (k, first)
    v_packed = Unsqueeze (v, first)
    cos_packed = Unsqueeze (cos, first)
    sin_packed = Unsqueeze (sin, first)
    q_rotated = RotaryEmbedding <num_heads: int = @heads> (q_packed, cos_packed, sin_packed)
    k_rotated = RotaryEmbedding <num_heads: int = @heads> (k_packed, cos_packed, sin_packed)
    second = Constant <value_ints: ints = [1]> ()
    row = Unsqueeze (segment_id, second)
    column = Unsqueeze (segment_id, first)
    mask = Equal (row, column)
    y_packed = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads> (q_rotated, k_rotated, v_packed, mask)
    y = Squeeze (y_packed, first)
}
"""
    )


def segment_flash_attention_function() -> FunctionProto:
    """SegmentAttention on ONNX Runtime's MultiHeadAttention, one segment at a time, so that no mask is needed.

    Without one its CPU kernel works in tiles: memory grows with the patches, not with their square, and images do not
    pay for each other. Segments are contiguous, with rising ids.
    """
    return parser.parse_function(
        """<domain: "moevlm", opset_import: ["" : 24, "com.microsoft" : 1]>
SegmentFlashAttention <heads> (q, k, v, cos, sin, segment_id) => (y)
{
    axis_0 = Constant <value_ints: ints = [0]> ()
    axis_1 = Constant <value_ints: ints = [1]> ()
    zero_1 = Constant <value_ints: ints = [0]> ()
    zero = Constant <value_int: int = 0> ()
    go = Cast <to: int = 9> (axis_1)
    always = Squeeze (go)
    q_packed = Unsqueeze (q, axis_0)
    k_packed = Unsqueeze (k, axis_0)
    v_packed = Unsqueeze (v, axis_0)
    cos_packed = Unsqueeze (cos, axis_0)
    sin_packed = Unsqueeze (sin, axis_0)
    q_rotated = RotaryEmbedding <num_heads: int = @heads> (q_packed, cos_packed, sin_packed)
    k_rotated = RotaryEmbedding <num_heads: int = @heads> (k_packed, cos_packed, sin_packed)
    ids, first_at, where_to, lengths = Unique <sorted: int = 1> (segment_id)
    ends = CumSum (lengths, zero)
    segments = Size (ids)
    nothing = Slice (q_rotated, zero_1, zero_1, axis_1)
    y_packed = Loop (segments, always, nothing) <body: graph = one_segment
        (int64 i, bool go_in, float[one, done, width] y_in) => (bool go_out, float[one, more, width] y_out)
    {
        go_out = Identity (go_in)
        length_0 = Gather (lengths, i)
        end_0 = Gather (ends, i)
        start_0 = Sub (end_0, length_0)
        end = Unsqueeze (end_0, axis_0)
        start = Unsqueeze (start_0, axis_0)
        q_part = Slice (q_rotated, start, end, axis_1)
        k_part = Slice (k_rotated, start, end, axis_1)
        v_part = Slice (v_packed, start, end, axis_1)
        y_part = com.microsoft.MultiHeadAttention <num_heads: int = @heads> (q_part, k_part, v_part)
        y_out = Concat <axis: int = 1> (y_in, y_part)
    }>
    y = Squeeze (y_packed, axis_0)
}
"""
    )


register(Op("CachedAttention", CachedAttentionSpec, lambda *_: cached_attention_function(), "cached_attention"))
register(Op("SegmentAttention", SegmentAttentionSpec, lambda *_: segment_attention_function(), "segment_attention"))
register(Op("SegmentFlashAttention", SegmentAttentionSpec, lambda *_: segment_flash_attention_function()))
