"""Heads of queries, keys and values out of the rows of qkv, normed and rotated, one head of one token to a row.

A head of DIM dimensions is two parts, as its size need not be a power of two: A of them, then B, or none if B is 0.
Dimensions beyond DIM are zeros.
"""

import triton
import triton.language as tl


@triton.jit
def load_part(x, offset, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """WIDTH dimensions from FIRST on: [rows, WIDTH] float32. offset: [rows] int64, where each row's head starts."""
    d = FIRST + tl.arange(0, WIDTH)
    if FIRST + WIDTH > DIM:
        value = tl.load(x + offset[:, None] + d[None, :], mask=mask[:, None] & (d < DIM)[None, :], other=0.0)
    else:
        value = tl.load(x + offset[:, None] + d[None, :], mask=mask[:, None], other=0.0)
    return value.to(tl.float32)


@triton.jit
def inverse_rms(x, offset, mask, DIM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, EPSILON: tl.constexpr):
    """1 / sqrt(mean of squares + EPSILON) of each row: [rows]."""
    part = load_part(x, offset, mask, 0, A, DIM)
    squares = tl.sum(part * part, 1)
    if B > 0:
        part = load_part(x, offset, mask, A, B, DIM)
        squares += tl.sum(part * part, 1)
    return tl.rsqrt(squares / DIM + EPSILON)


@triton.jit
def load_heads(
    x,
    offset,  # [rows] int64: where each row's head starts in x
    mask,  # [rows]: which rows are real; the others are zeros
    token,  # [rows]: whose cos and sin
    cos,  # [T, HALF] float32
    sin,
    gain,  # [DIM] float32
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ROTARY_START: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """WIDTH dimensions from FIRST on, normed and rotated: [rows, WIDTH] float32."""
    d = FIRST + tl.arange(0, WIDTH)
    value = load_part(x, offset, mask, FIRST, WIDTH, DIM)
    if HAS_NORMS:
        inverse = inverse_rms(x, offset, mask, DIM, A, B, EPSILON)[:, None]
        value *= inverse * tl.load(gain + d, mask=d < DIM, other=0.0)[None, :]
    if HALF > 0 and FIRST < ROTARY_START + 2 * HALF and FIRST + WIDTH > ROTARY_START:
        rotated = (d >= ROTARY_START) & (d < ROTARY_START + 2 * HALF)
        first = d < ROTARY_START + HALF
        partner = tl.where(first, d + HALF, d - HALF)
        both = mask[:, None] & rotated[None, :]
        other = tl.load(x + offset[:, None] + partner[None, :], mask=both, other=0.0).to(tl.float32)
        if HAS_NORMS:
            other *= inverse * tl.load(gain + partner, mask=rotated, other=0.0)[None, :]
        angle = token.to(tl.int64)[:, None] * HALF + (tl.where(first, d, d - HALF) - ROTARY_START)[None, :]
        turned = tl.load(sin + angle, mask=both, other=0.0) * other
        value = value * tl.load(cos + angle, mask=both, other=1.0) + tl.where(first[None, :], -turned, turned)
    return value
