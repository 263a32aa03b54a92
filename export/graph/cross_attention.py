"""`moevlm::CrossAttention` in standard ONNX, as function bodies: the same queries for each image of a packed call."""

from onnx import FunctionProto, parser

from moevlm.export.graph.op import Op, register
from moevlm.plugins.ops.spec import CrossAttentionSpec

CROSS_ATTENTION = "CrossAttention"


def cross_attention_function(_: CrossAttentionSpec, present: tuple[bool, ...]) -> FunctionProto:
    """Copies of the queries, each of which sees the patches of its image; as `moevlm.plugins.ops.attention` says."""
    _require_all(present)
    return parser.parse_function(
        """<domain: "moevlm", opset_import: ["" : 24]>
CrossAttention <heads> (q, k, v, image_start) => (y)
{
    axis_0 = Constant <value_ints: ints = [0]> ()
    columns = Constant <value_ints: ints = [1, 2]> ()
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    first = Constant <value_ints: ints = [0]> ()
    second = Constant <value_ints: ints = [1]> ()
    last = Constant <value_ints: ints = [-1]> ()
    far = Constant <value_ints: ints = [4611686018427387904]> ()
    starts = Cast <to: int = 7> (image_start)
    begins = Slice (starts, first, last)
    ends = Slice (starts, second, far)
    begin = Unsqueeze (begins, columns)
    end = Unsqueeze (ends, columns)
    patches_1 = Shape <start: int = 0, end: int = 1> (k)
    patches = Squeeze (patches_1)
    patch = Range (zero, patches, one)
    begun = GreaterOrEqual (patch, begin)
    going = Less (patch, end)
    seen = And (begun, going)
    images = Shape (begins)
    queries = Shape <start: int = 0, end: int = 1> (q)
    rows = Concat <axis: int = 0> (images, queries, second)
    seen_by_row = Expand (seen, rows)
    mask = Flatten <axis: int = 2> (seen_by_row)
    q_by_row = Expand (q, rows)
    q_flat = Flatten <axis: int = 2> (q_by_row)
    q_packed = Unsqueeze (q_flat, axis_0)
    k_packed = Unsqueeze (k, axis_0)
    v_packed = Unsqueeze (v, axis_0)
    y_packed = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads> (q_packed, k_packed, v_packed, mask)
    y_shape = Shape (q_by_row)
    y = Reshape (y_packed, y_shape)
}
"""
    )


def cross_flash_attention_function(_: CrossAttentionSpec, present: tuple[bool, ...]) -> FunctionProto:
    """CrossAttention on ONNX Runtime's MultiHeadAttention, one image at a time; see `segment_flash_attention_function`.

    No query is copied, and none sees the patches of other images, not even to mask them.
    """
    _require_all(present)
    return parser.parse_function(
        """<domain: "moevlm", opset_import: ["" : 24, "com.microsoft" : 1]>
CrossFlashAttention <heads> (q, k, v, image_start) => (y)
{
    axis_0 = Constant <value_ints: ints = [0]> ()
    axis_1 = Constant <value_ints: ints = [1]> ()
    zero_1 = Constant <value_ints: ints = [0]> ()
    one = Constant <value_int: int = 1> ()
    one_1 = Constant <value_ints: ints = [1]> ()
    always = Cast <to: int = 9> (one)
    q_packed = Unsqueeze (q, axis_0)
    k_packed = Unsqueeze (k, axis_0)
    v_packed = Unsqueeze (v, axis_0)
    starts = Cast <to: int = 7> (image_start)
    boundaries = Size (starts)
    images = Sub (boundaries, one)
    nothing = Slice (q_packed, zero_1, zero_1, axis_0)
    y = Loop (images, always, nothing) <body: graph = one_image
        (int64 i, bool go_in, float[done, queries, width] y_in) => (bool go_out, float[more, queries, width] y_out)
    {
        go_out = Identity (go_in)
        i_1 = Unsqueeze (i, axis_0)
        next_1 = Add (i_1, one_1)
        start = Gather (starts, i_1)
        end = Gather (starts, next_1)
        k_part = Slice (k_packed, start, end, axis_1)
        v_part = Slice (v_packed, start, end, axis_1)
        y_part = com.microsoft.MultiHeadAttention <num_heads: int = @heads> (q_packed, k_part, v_part)
        y_out = Concat <axis: int = 0> (y_in, y_part)
    }>
}
"""
    )


def _require_all(present: tuple[bool, ...]) -> None:
    if present != (True,) * 4:
        raise ValueError(f"{CROSS_ATTENTION} has q, k, v and image_start")


register(Op(CROSS_ATTENTION, CrossAttentionSpec, cross_attention_function, "cross_attention"))
register(Op("CrossFlashAttention", CrossAttentionSpec, cross_flash_attention_function))
