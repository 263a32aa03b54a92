"""Codes of eight bits for keys and values, with a float32 scale for each head of each token.

int8: -127 to 127. fp8: e4m3, up to 448. The largest magnitude of a head takes the largest code.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.e4m3 import decode_fp8, encode_fp8


@triton.jit
def scale_of(largest, H: tl.constexpr):
    """The scale of heads whose largest magnitude is `largest`."""
    LARGEST_CODE: tl.constexpr = 448 if H.cache == "fp8" else 127
    return tl.maximum(largest, 1e-30) / LARGEST_CODE


@triton.jit
def encode(value, scale, H: tl.constexpr):
    """value [rows, D] float32 as codes, int8. scale: [rows]."""
    value = value / scale[:, None]
    if H.cache == "fp8":
        code = encode_fp8(tl.minimum(tl.maximum(value, -448.0), 448.0))
    else:
        code = tl.floor(tl.minimum(tl.maximum(value, -127.0), 127.0) + 0.5)
    return code.to(tl.int8)


@triton.jit
def decode_codes(code, dtype: tl.constexpr, H: tl.constexpr):
    """Codes as numbers of `dtype`, exactly; those of fp8 without hardware for them are divided by 256."""
    if H.cache == "fp8":
        value = decode_fp8(code, dtype, H.native_fp8)
    else:
        value = code.to(dtype)
    return value


@triton.jit
def decoded_scale(scale, H: tl.constexpr):
    """What a decoded code is to be multiplied by."""
    if H.cache == "fp8" and not H.native_fp8:
        scale *= 256
    return scale
