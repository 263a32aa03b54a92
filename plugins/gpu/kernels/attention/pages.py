"""One head's block of one page: PAGE rows of DIM values, or of codes and then PAGE float32 scales.

Scales stand together so that those of consecutive tokens come 16 bytes at a time.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.codes import decode_codes, decoded_scale, encode


@triton.jit
def block_of(cache, page, head, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, CACHE: tl.constexpr):
    """Where the block starts. page: int64, a number or several."""
    WIDTH: tl.constexpr = DIM if CACHE == "" else DIM + 4
    return cache + (page * KV_HEADS + head) * (PAGE * WIDTH)


@triton.jit
def load_rows(
    block,
    row,  # [BN] int32: which rows
    mask,  # [BN]: those that are real; the others are zeros
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Values or codes of WIDTH dimensions from FIRST on, zeros beyond DIM: [BN, WIDTH] as stored."""
    d = FIRST + tl.arange(0, WIDTH)
    pointer = block + (row[:, None] * DIM + d[None, :])
    if MASKED and FIRST + WIDTH > DIM:
        value = tl.load(pointer, mask=mask[:, None] & (d < DIM)[None, :], other=0)
    elif MASKED:
        value = tl.load(pointer, mask=mask[:, None], other=0)
    elif FIRST + WIDTH > DIM:
        value = tl.load(pointer, mask=(d < DIM)[None, :], other=0)
    else:
        value = tl.load(pointer)
    return value


@triton.jit
def load_scales(
    block,
    row,
    mask,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    CACHE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Factors of decoded rows: [BN] float32."""
    pointer = (block + PAGE * DIM).to(tl.pointer_type(tl.float32)) + row
    if MASKED:
        scale = tl.load(pointer, mask=mask, other=0.0)
    else:
        scale = tl.load(pointer)
    return decoded_scale(scale, CACHE, NATIVE_FP8)


@triton.jit
def store_rows(
    block,  # pointers: each row's block, [rows]
    row,  # [rows]: its place there
    mask,
    value,  # [rows, WIDTH] float32
    scale,  # [rows] float32, of codes
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    CACHE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """Write dimensions FIRST to FIRST + WIDTH. Returns what the cache gives back: [rows, WIDTH] float32."""
    d = FIRST + tl.arange(0, WIDTH)
    pointer = block[:, None] + (row[:, None] * DIM + d[None, :])
    if CACHE == "":
        stored = value.to(block.dtype.element_ty)
        given_back = stored.to(tl.float32)
    else:
        stored = encode(value, scale, CACHE)
        given_back = decode_codes(stored, tl.float32, CACHE, NATIVE_FP8)
        given_back *= decoded_scale(scale, CACHE, NATIVE_FP8)[:, None]
    tl.store(pointer, stored, mask=mask[:, None] & (d < DIM)[None, :])
    return given_back


@triton.jit
def store_scales(block, row, mask, scale, PAGE: tl.constexpr, DIM: tl.constexpr):
    tl.store((block + PAGE * DIM).to(tl.pointer_type(tl.float32)) + row, scale, mask=mask)
