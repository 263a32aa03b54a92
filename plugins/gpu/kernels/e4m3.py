"""Codes in e4m3, eight bits with three of mantissa, up to 448: of weights, of activations and of caches."""

import triton
import triton.language as tl


@triton.jit
def decode_fp8(code, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """e4m3 codes as numbers; without hardware for them, divided by 256."""
    if NATIVE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        bits = code.to(tl.int16)
        value = ((bits & 0x7F) << 7 | (bits & 0x80) << 8).to(tl.float16, bitcast=True)
    return value.to(dtype)


@triton.jit
def encode_fp8(value):
    """float32 of up to 448 in magnitude as e4m3, int8: to the nearest, ties to even; what is no number stays none.

    In integers: Triton's interpreter loses the carry where rounding reaches the next power of two.
    """
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # Below 2**-6 codes count steps of 2**-9, which is what the last place is worth in numbers from 2**14 on.
    small = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0x3C800000, small, tl.minimum(rounded - (120 << 3), 0x7F))
    return (code | (bits >> 24 & 0x80)).to(tl.int8)
