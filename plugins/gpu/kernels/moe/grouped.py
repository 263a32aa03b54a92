"""Experts for many tokens: rows sorted by expert, in blocks of BM, through grouped products; then summed per token.

Programs run through a block's columns first, so blocks of the same expert meet its weights in the L2 cache.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.moe.indices import is_expert
from moevlm.plugins.gpu.kernels.moe.products import down_tile, gate_up_tile, inner_of, store_tile
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def block_rows(starts, blocks, block, BM: tl.constexpr):
    """A block's expert, int64, its places among the sorted rows, and which of them are real: [BM]."""
    e = tl.load(blocks + 2 * block)
    place = tl.load(blocks + 2 * block + 1) + tl.arange(0, BM)
    return e.to(tl.int64), place, place < tl.load(starts + e + 1)


@triton.jit
def routed_rows(rows, weight, place, mask, SPEC: tl.constexpr, BM: tl.constexpr):
    """The routed rows at these places, and their weights where these scale the input, else zeros: [BM]."""
    row = tl.load(rows + place, mask=mask, other=0)
    factor = tl.zeros([BM], tl.float32)
    if SPEC.weight_on == "input":
        factor = tl.load(weight + row, mask=mask, other=0.0)
    return row, factor


@triton.jit
def grouped_gate_up(
    x,  # [T, H]
    weight,  # [T, k] float32
    w,
    scale,
    zero,
    row_scale,
    bias,
    rows,  # [T * k] int32: rows by expert
    starts,  # [2, E + 1] int32
    blocks,  # [.., 2] int32
    inner,  # [T * k, I], written in the order of `rows`
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SPEC: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    INNER: tl.constexpr = inner_of(W, SPEC)
    TILES: tl.constexpr = (INNER + TILE.BN - 1) // TILE.BN
    block = tl.program_id(0) // TILES
    wait_for_previous(OVERLAPS)
    if block >= tl.load(starts + 2 * EXPERTS + 1):
        return
    e, place, mask = block_rows(starts, blocks, block, TILE.BM)
    row, factor = routed_rows(rows, weight, place, mask, SPEC, TILE.BM)
    n = (tl.program_id(0) % TILES) * TILE.BN + tl.arange(0, TILE.BN)
    offset = (row // TOP_K).to(tl.int64) * W.width
    out = gate_up_tile(x, offset, mask, factor, w, scale, zero, row_scale, bias, e, n, SPEC, W, TILE, INTERPRETED)
    store_tile(inner, place, n, out, mask, INNER)


@triton.jit
def grouped_down(
    inner,  # [T * k, I], in the order of `rows`
    w,
    scale,
    zero,
    row_scale,
    bias,
    rows,
    starts,
    blocks,
    out,  # [T * k, H], written in the order of `index`
    EXPERTS: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    TILES: tl.constexpr = (W.rows + TILE.BN - 1) // TILE.BN
    block = tl.program_id(0) // TILES
    wait_for_previous(OVERLAPS)
    if block >= tl.load(starts + 2 * EXPERTS + 1):
        return
    e, place, mask = block_rows(starts, blocks, block, TILE.BM)
    row = tl.load(rows + place, mask=mask, other=0)
    n = (tl.program_id(0) % TILES) * TILE.BN + tl.arange(0, TILE.BN)
    offset = place.to(tl.int64) * W.width
    acc = down_tile(inner, offset, mask, w, scale, zero, row_scale, bias, e, n, W, TILE, INTERPRETED)
    store_tile(out, row, n, acc, mask, W.rows)


@triton.jit
def combine(
    rows,  # [T * k, H]
    index,  # [T, k] int32
    weight,  # [T, k] float32
    y,  # [T, H], written: each token's k rows, times their weights unless those scaled the input
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    SPEC: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous(OVERLAPS)
    TILES: tl.constexpr = (HIDDEN + STEP - 1) // STEP
    token = (tl.program_id(0) // TILES).to(tl.int64)
    n = (tl.program_id(0) % TILES) * STEP + tl.arange(0, STEP)
    total = tl.zeros([STEP], tl.float32)
    for j in tl.static_range(TOP_K):
        width = tl.where(is_expert(tl.load(index + token * TOP_K + j)), HIDDEN, 0)
        row = tl.load(rows + (token * TOP_K + j) * HIDDEN + n, mask=n < width, other=0.0).to(tl.float32)
        if SPEC.weight_on == "output":
            row *= tl.load(weight + token * TOP_K + j)
        total += row
    tl.store(y + token * HIDDEN + n, total.to(y.dtype.element_ty), mask=n < HIDDEN)
