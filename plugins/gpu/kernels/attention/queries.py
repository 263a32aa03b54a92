"""Query heads of one KV head as rows of a matrix tile, and their results.

A tile has LINES heads of each of its tokens, the heads of a token side by side; a KV head with more query heads than
that has several tiles. What is left of BM rows is idle.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.heads import load_heads


@triton.jit
def rows_of(slot, first, stop, GROUP: tl.constexpr, LINES: tl.constexpr, BM: tl.constexpr):
    """Which query head of which token each row is.

    slot: KV head * tiles of a KV head + tile. first, stop: the tile's tokens.
    Returns the query head [BM], the token [BM], and whether the row is real [BM].
    """
    TILES: tl.constexpr = (GROUP + LINES - 1) // LINES
    line = tl.arange(0, BM)
    member = slot % TILES * LINES + line % LINES
    token = first + line // LINES
    return slot // TILES * GROUP + member, token, (member < GROUP) & (token < stop)


@triton.jit
def load_queries(
    qkv,
    cos,
    sin,
    gain,
    query_head,
    token,
    mask,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_IN_KEY: tl.constexpr,
    ROTARY_START: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    EPSILON: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Normed and rotated, in the dtype of qkv: [BM, A] and [BM, B], the second the first again if B is 0."""
    QKV: tl.constexpr = (HEADS + KV_HEADS) * DIM + (0 if VALUE_IN_KEY else KV_HEADS * VALUE_DIM)
    dtype: tl.constexpr = tl.float32 if INTERPRETED else qkv.dtype.element_ty
    offset = token.to(tl.int64) * QKV + query_head * DIM
    query = load_heads(
        qkv, offset, mask, token, cos, sin, gain, 0, A, DIM, A, B, ROTARY_START, HALF, HAS_NORMS, EPSILON
    ).to(dtype)
    if B > 0:
        rest = load_heads(
            qkv, offset, mask, token, cos, sin, gain, A, B, DIM, A, B, ROTARY_START, HALF, HAS_NORMS, EPSILON
        ).to(dtype)
    else:
        rest = query
    return query, rest


@triton.jit
def store_results(
    y, acc, total, query_head, token, mask, HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr
):
    """Each row's sum of values over its total, into y [T, HEADS * VALUE_DIM]."""
    d = tl.arange(0, VALUE_WIDTH)
    offset = (token.to(tl.int64) * HEADS + query_head) * VALUE_DIM
    result = (acc / total[:, None]).to(y.dtype.element_ty)
    tl.store(y + offset[:, None] + d[None, :], result, mask=mask[:, None] & (d < VALUE_DIM)[None, :])
