"""Query heads of one KV head as rows of a matrix tile, and their results.

A tile has as many heads of each of its tokens as it has rows, at most; the heads of a token lie side by side. A KV head
with more query heads than that has several tiles. What is left of the rows is idle.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.heads import load_heads


@triton.constexpr_function
def lines_of(H, TILE):
    """Query heads of a token in one tile."""
    return min(H.group, TILE.BM)


@triton.constexpr_function
def tiles_of(H, TILE):
    """Tiles of a KV head's query heads."""
    return -(-H.group // min(H.group, TILE.BM))


@triton.jit
def rows_of(slot, first, stop, TILE: tl.constexpr, H: tl.constexpr):
    """Which query head of which token each row is.

    slot: KV head * tiles of a KV head + tile. first, stop: the tile's tokens.
    Returns the query head [BM], the token [BM], and whether the row is real [BM].
    """
    LINES: tl.constexpr = lines_of(H, TILE)
    TILES: tl.constexpr = tiles_of(H, TILE)
    line = tl.arange(0, TILE.BM)
    member = slot % TILES * LINES + line % LINES
    token = first + line // LINES
    return slot // TILES * H.group + member, token, (member < H.group) & (token < stop)


@triton.jit
def load_queries(qkv, cos, sin, gain, query_head, token, mask, H: tl.constexpr, INTERPRETED: tl.constexpr):
    """Normed and rotated, in the dtype of qkv: [BM, H.first] and [BM, H.rest], or the first again."""
    dtype: tl.constexpr = tl.float32 if INTERPRETED else qkv.dtype.element_ty
    offset = token.to(tl.int64) * H.row + query_head * H.dim
    query = load_heads(qkv, offset, mask, token, cos, sin, gain, 0, H.first, H).to(dtype)
    if H.rest > 0:
        rest = load_heads(qkv, offset, mask, token, cos, sin, gain, H.first, H.rest, H).to(dtype)
    else:
        rest = query
    return query, rest


@triton.jit
def store_results(y, acc, total, query_head, token, mask, H: tl.constexpr):
    """Each row's sum of values over its total, into y [T, H.heads * H.value_dim]."""
    d = tl.arange(0, H.value_width)
    offset = (token.to(tl.int64) * H.heads + query_head) * H.value_dim
    result = (acc / total[:, None]).to(y.dtype.element_ty)
    tl.store(y + offset[:, None] + d[None, :], result, mask=mask[:, None] & (d < H.value_dim)[None, :])
