"""Experts for many tokens: rows sorted by expert, in blocks of BM, through grouped products; then summed per token.

Programs run through a block's columns first, so blocks of the same expert meet its weights in the L2 cache.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.moe.products import down_tile, gate_up_tile


@triton.jit
def grouped_gate_up(
    x,  # [T, H]
    weight,  # [T, k] float32
    w,
    scale,
    bias,
    rows,  # [T * k] int32: rows by expert
    starts,  # [2, E + 1] int32
    blocks,  # [.., 2] int32
    inner,  # [T * k, I], written in the order of `rows`
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SCALES_INPUT: tl.constexpr,
    HAS_BIASES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    TILES: tl.constexpr = (INNER + BN - 1) // BN
    block = tl.program_id(0) // TILES
    if block >= tl.load(starts + 2 * EXPERTS + 1):
        return
    e = tl.load(blocks + 2 * block)
    place = tl.load(blocks + 2 * block + 1) + tl.arange(0, BM)
    mask = place < tl.load(starts + e + 1)
    row = tl.load(rows + place, mask=mask, other=0)
    factor = tl.zeros([BM], tl.float32)
    if SCALES_INPUT:
        factor = tl.load(weight + row, mask=mask, other=0.0)
    n = (tl.program_id(0) % TILES) * BN + tl.arange(0, BN)
    out = gate_up_tile(
        x, (row // TOP_K).to(tl.int64) * HIDDEN, mask, factor, w, scale, bias, e.to(tl.int64), n,
        HIDDEN, INNER, ACTIVATION, GATED, ALPHA, LIMIT, SCALES_INPUT, HAS_BIASES, WEIGHTS, BLOCK,
        BM, BN, BK, NATIVE_FP8, INTERPRETED,
    )  # fmt: skip
    pointer = inner + place.to(tl.int64)[:, None] * INNER + n[None, :]
    tl.store(pointer, out.to(inner.dtype.element_ty), mask=mask[:, None] & (n < INNER)[None, :])


@triton.jit
def grouped_down(
    inner,  # [T * k, I], in the order of `rows`
    w,
    scale,
    bias,
    rows,
    starts,
    blocks,
    out,  # [T * k, H], written in the order of `index`
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    HAS_BIASES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    TILES: tl.constexpr = (HIDDEN + BN - 1) // BN
    block = tl.program_id(0) // TILES
    if block >= tl.load(starts + 2 * EXPERTS + 1):
        return
    e = tl.load(blocks + 2 * block)
    place = tl.load(blocks + 2 * block + 1) + tl.arange(0, BM)
    mask = place < tl.load(starts + e + 1)
    row = tl.load(rows + place, mask=mask, other=0).to(tl.int64)
    n = (tl.program_id(0) % TILES) * BN + tl.arange(0, BN)
    acc = down_tile(
        inner, place.to(tl.int64) * INNER, mask, w, scale, bias, e.to(tl.int64), n,
        HIDDEN, INNER, HAS_BIASES, WEIGHTS, BLOCK, BM, BN, BK, NATIVE_FP8, INTERPRETED,
    )  # fmt: skip
    pointer = out + row[:, None] * HIDDEN + n[None, :]
    tl.store(pointer, acc.to(out.dtype.element_ty), mask=mask[:, None] & (n < HIDDEN)[None, :])


@triton.jit
def combine(
    rows,  # [T * k, H]
    weight,  # [T, k] float32
    y,  # [T, H], written: each token's k rows, times their weights unless those scaled the input
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    SCALES_INPUT: tl.constexpr,
    STEP: tl.constexpr,
):
    TILES: tl.constexpr = (HIDDEN + STEP - 1) // STEP
    token = (tl.program_id(0) // TILES).to(tl.int64)
    n = (tl.program_id(0) % TILES) * STEP + tl.arange(0, STEP)
    total = tl.zeros([STEP], tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(rows + (token * TOP_K + j) * HIDDEN + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
        if not SCALES_INPUT:
            row *= tl.load(weight + token * TOP_K + j)
        total += row
    tl.store(y + token * HIDDEN + n, total.to(y.dtype.element_ty), mask=n < HIDDEN)
