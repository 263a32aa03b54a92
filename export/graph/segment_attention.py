"""`moevlm::SegmentAttention` in standard ONNX, as function bodies: attention inside each image of a packed call."""

from onnx import FunctionProto, parser

from moevlm.export.graph.image_loop import PACKED, each_image
from moevlm.export.graph.op import Op, register
from moevlm.plugins.ops.spec import SegmentAttentionSpec

SEGMENT_ATTENTION = "SegmentAttention"
# Of queries and keys, by whether there are tables for it.
_ROTATE = {
    False: """q_turned = Identity (q_packed)
    k_turned = Identity (k_packed)""",
    True: """cos_packed = Unsqueeze (cos, axis_0)
    sin_packed = Unsqueeze (sin, axis_0)
    q_turned = RotaryEmbedding <num_heads: int = @heads> (q_packed, cos_packed, sin_packed)
    k_turned = RotaryEmbedding <num_heads: int = @heads> (k_packed, cos_packed, sin_packed)""",
}


def _rotation(present: tuple[bool, ...]) -> str:
    """The fragment for inputs of which these are present. Raises ValueError for others than the op may have."""
    tables = present[3:5] == (True, True)
    if present != (True, True, True, tables, tables, True):
        raise ValueError(f"{SEGMENT_ATTENTION} has q, k, v and image_start, and cos and sin or neither")
    return _ROTATE[tables]


def segment_attention_function(_: SegmentAttentionSpec, present: tuple[bool, ...]) -> FunctionProto:
    """Rotate, attend inside each image; as `moevlm.plugins.ops.attention.segment_attention`."""
    return parser.parse_function(
        """<domain: "moevlm", opset_import: ["" : 24]>
SegmentAttention <heads> (q, k, v, cos, sin, image_start) => (y)
{
    axis_0 = Constant <value_ints: ints = [0]> ()
    axis_1 = Constant <value_ints: ints = [1]> ()
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    far = Constant <value_ints: ints = [4611686018427387904]> ()
    q_packed = Unsqueeze (q, axis_0)
    k_packed = Unsqueeze (k, axis_0)
    v_packed = Unsqueeze (v, axis_0)
    ROTATED
    starts = Cast <to: int = 7> (image_start)
    ends = Slice (starts, axis_1, far)
    patches_1 = Shape <start: int = 0, end: int = 1> (q)
    patches = Squeeze (patches_1)
    patch = Range (zero, patches, one)
    patch_column = Unsqueeze (patch, axis_1)
    ended = GreaterOrEqual (patch_column, ends)
    ended_i = Cast <to: int = 7> (ended)
    image = ReduceSum <keepdims: int = 0> (ended_i, axis_1)
    row = Unsqueeze (image, axis_1)
    column = Unsqueeze (image, axis_0)
    mask = Equal (row, column)
    y_packed = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads> (q_turned, k_turned, v_packed, mask)
    y = Squeeze (y_packed, axis_0)
}
""".replace("ROTATED", _rotation(present))
    )


def segment_flash_attention_function(_: SegmentAttentionSpec, present: tuple[bool, ...]) -> FunctionProto:
    """SegmentAttention on ONNX Runtime's MultiHeadAttention, one image at a time; see `image_loop`."""
    return parser.parse_function(
        f"""<domain: "moevlm", opset_import: ["" : 24, "com.microsoft" : 1]>
SegmentFlashAttention <heads> (q, k, v, cos, sin, image_start) => (y)
{{
    {PACKED}
    {_rotation(present)}
    {each_image("q_turned", "k_turned", "Slice (q_turned, start, end, axis_1)", axis=1)}
    y = Squeeze (y_packed, axis_0)
}}
"""
    )


register(Op(SEGMENT_ATTENTION, SegmentAttentionSpec, segment_attention_function, "segment_attention"))
register(Op("SegmentFlashAttention", SegmentAttentionSpec, segment_flash_attention_function))
