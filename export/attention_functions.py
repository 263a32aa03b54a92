"""`moevlm::CachedAttention` and `moevlm::SegmentAttention` in standard ONNX, as function bodies.

What a target cannot do better runs as written here: RotaryEmbedding, TensorScatter, Attention (opset 24).
"""

from onnx import FunctionProto, parser

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
