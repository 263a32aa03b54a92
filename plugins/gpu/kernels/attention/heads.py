"""Heads of queries, keys and values out of the rows of qkv, normed and rotated, one head of one token to a row.

A head is padded to two parts as wide as matrix products take them, see `PagedHeads`; the padding is zeros.
"""

import triton
import triton.language as tl


@triton.jit
def load_part(x, offset, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """WIDTH of DIM dimensions from FIRST on: [rows, WIDTH] float32. offset: [rows] int64, where each head starts."""
    d = FIRST + tl.arange(0, WIDTH)
    if FIRST + WIDTH > DIM:
        value = tl.load(x + offset[:, None] + d[None, :], mask=mask[:, None] & (d < DIM)[None, :], other=0.0)
    else:
        value = tl.load(x + offset[:, None] + d[None, :], mask=mask[:, None], other=0.0)
    return value.to(tl.float32)


@triton.jit
def inverse_rms(x, offset, mask, H: tl.constexpr):
    """1 / sqrt(mean of squares + epsilon) of each row: [rows]."""
    part = load_part(x, offset, mask, 0, H.first, H.dim)
    squares = tl.sum(part * part, 1)
    if H.rest > 0:
        part = load_part(x, offset, mask, H.first, H.rest, H.dim)
        squares += tl.sum(part * part, 1)
    return tl.rsqrt(squares / H.dim + H.epsilon)


@triton.jit
def load_heads(
    x,
    offset,  # [rows] int64: where each row's head starts in x
    mask,  # [rows]: which rows are real; the others are zeros
    token,  # [rows]: whose cos and sin
    cos,  # [T, H.half] float32
    sin,
    gain,  # [H.dim] float32
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    H: tl.constexpr,
):
    """WIDTH dimensions of queries or keys from FIRST on, normed and rotated: [rows, WIDTH] float32."""
    END: tl.constexpr = H.rotary_start + 2 * H.half
    d = FIRST + tl.arange(0, WIDTH)
    value = load_part(x, offset, mask, FIRST, WIDTH, H.dim)
    if H.has_norms:
        inverse = inverse_rms(x, offset, mask, H)[:, None]
        value *= inverse * tl.load(gain + d, mask=d < H.dim, other=0.0)[None, :]
    if H.half > 0 and FIRST < END and H.rotary_start < FIRST + WIDTH:
        rotated = (d >= H.rotary_start) & (d < END)
        lower = d < H.rotary_start + H.half
        partner = tl.where(lower, d + H.half, d - H.half)
        both = mask[:, None] & rotated[None, :]
        other = tl.load(x + offset[:, None] + partner[None, :], mask=both, other=0.0).to(tl.float32)
        if H.has_norms:
            other *= inverse * tl.load(gain + partner, mask=rotated, other=0.0)[None, :]
        row = token.to(tl.int64)[:, None] * H.half
        angle = (tl.where(lower, d, partner) - H.rotary_start)[None, :]
        turned = tl.load(sin + row + angle, mask=both, other=0.0) * other
        value = value * tl.load(cos + row + angle, mask=both, other=1.0) + tl.where(lower[None, :], -turned, turned)
    return value
