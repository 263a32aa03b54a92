"""Attention to the patches of one image after the other, in ONNX text that bodies on ONNX Runtime's kernel share.

Without a mask, com.microsoft::MultiHeadAttention works in tiles on a CPU: memory grows with the patches, not with their
square, and images do not pay for each other.
"""

# Inputs q, k, v [n, width] as that kernel takes them, [1, n, width], and constants.
PACKED = """
    axis_0 = Constant <value_ints: ints = [0]> ()
    axis_1 = Constant <value_ints: ints = [1]> ()
    zero_1 = Constant <value_ints: ints = [0]> ()
    one = Constant <value_int: int = 1> ()
    one_1 = Constant <value_ints: ints = [1]> ()
    always = Cast <to: int = 9> (one)
    q_packed = Unsqueeze (q, axis_0)
    k_packed = Unsqueeze (k, axis_0)
    v_packed = Unsqueeze (v, axis_0)
"""
_LOOP = """
    starts = Cast <to: int = 7> (image_start)
    boundaries = Size (starts)
    images = Sub (boundaries, one)
    nothing = Slice ({queries}, zero_1, zero_1, axis_{axis})
    y_packed = Loop (images, always, nothing) <body: graph = one_image
        (int64 i, bool go_in, float[?, ?, ?] y_in) => (bool go_out, float[?, ?, ?] y_out)
    {{
        go_out = Identity (go_in)
        i_1 = Unsqueeze (i, axis_0)
        next_1 = Add (i_1, one_1)
        start = Gather (starts, i_1)
        end = Gather (starts, next_1)
        q_part = {own_queries}
        k_part = Slice ({keys}, start, end, axis_1)
        v_part = Slice (v_packed, start, end, axis_1)
        y_part = com.microsoft.MultiHeadAttention <num_heads: int = @heads> (q_part, k_part, v_part)
        y_out = Concat <axis: int = {axis}> (y_in, y_part)
    }}>
"""


def each_image(queries: str, keys: str, own_queries: str, axis: int) -> str:
    """The text that makes y_packed, behind `PACKED`.

    queries, keys: names of values [1, n, width]. own_queries: a node that makes an image's queries, whose patches are
    `start` to `end`. axis: along which the outputs of images follow each other.
    """
    return _LOOP.format(queries=queries, keys=keys, own_queries=own_queries, axis=axis)
