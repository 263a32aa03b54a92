"""Attention of the same queries to the patches of each image: flash attention, see `segment`."""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.segment import attend_rows, load_block, store_block
from moevlm.plugins.gpu.kernels.attention.segments import clamped


@triton.jit
def load_queries(
    x,
    rows,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
):
    """WIDTH dimensions of BM queries from FIRST on, times SCALE."""
    query = load_block(x, rows, FIRST, WIDTH, STRIDE, H, BM, True)
    return (query.to(tl.float32) * SCALE).to(x.dtype.element_ty)


@triton.jit
def cross_attention(
    q,  # [QUERIES, HEADS * H.dim]
    kv,  # [T, 2 * HEADS * H.dim]
    image_start,  # [N + 1] int32
    y,  # [N, QUERIES, HEADS * H.dim], written
    patches,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """BM queries of one head with one image."""
    WIDTH: tl.constexpr = HEADS * H.dim
    TILES: tl.constexpr = (QUERIES + BM - 1) // BM
    image = tl.program_id(0) // TILES
    first = tl.program_id(0) % TILES * BM
    rows = QUERIES - first
    head = tl.program_id(1).to(tl.int64)
    start = clamped(tl.load(image_start + image), 0, patches)
    stop = clamped(tl.load(image_start + image + 1), start, patches)
    queries = q + first * WIDTH + head * H.dim
    query = load_queries(queries, rows, 0, H.first, WIDTH, SCALE, H, BM)
    query_rest = query
    if H.rest > 0:
        query_rest = load_queries(queries, rows, H.first, H.rest, WIDTH, SCALE, H, BM)
    keys = kv + head * H.dim
    acc, acc_rest = attend_rows(
        query, query_rest, keys, keys + WIDTH, start, stop, 2 * WIDTH, 2 * WIDTH, H, BM, BN, INTERPRETED
    )
    out = y + (image.to(tl.int64) * QUERIES + first) * WIDTH + head * H.dim
    store_block(out, acc, rows, 0, H.first, WIDTH, H, BM)
    if H.rest > 0:
        store_block(out, acc_rest, rows, H.first, H.rest, WIDTH, H, BM)
