"""`moevlm::CrossAttention` in standard ONNX, as function bodies: the same queries for each image of a packed call."""

from onnx import FunctionProto, parser

from moevlm.export.graph.image_loop import PACKED, each_image
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
    """CrossAttention on ONNX Runtime's MultiHeadAttention, one image at a time; see `image_loop`.

    No query is copied, and none sees the patches of other images, not even to mask them.
    """
    _require_all(present)
    return parser.parse_function(
        f"""<domain: "moevlm", opset_import: ["" : 24, "com.microsoft" : 1]>
CrossFlashAttention <heads> (q, k, v, image_start) => (y)
{{
    {PACKED}
    {each_image("q_packed", "k_packed", "Identity (q_packed)", axis=0)}
    y = Identity (y_packed)
}}
"""
    )


def _require_all(present: tuple[bool, ...]) -> None:
    if present != (True,) * 4:
        raise ValueError(f"{CROSS_ATTENTION} has q, k, v and image_start")


register(Op(CROSS_ATTENTION, CrossAttentionSpec, cross_attention_function, "cross_attention"))
register(Op("CrossFlashAttention", CrossAttentionSpec, cross_flash_attention_function))
