"""Experts for 1 to 8 tokens, where reading weights is all the time: each active expert's are read once, unsorted.

A program is (columns of an expert, a routed row). The first row of an expert computes for all tokens that chose it; the
others exit. Tokens take the rows of one matrix tile, which has room for 16. A token must not choose an expert twice:
where one does, as the router lets a token whose logits are not numbers, its own output is undefined, and no other's.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.moe.indices import nearest_expert
from moevlm.plugins.gpu.kernels.moe.products import add_product, down_tile, gate_up_tile, load_rows, scale_rows


@triton.jit
def rows_of(index, e, tokens, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PADDED_K: tl.constexpr, BM: tl.constexpr):
    """For each token, its row that goes to expert e; a large number if none does: [BM]."""
    token = tl.arange(0, BM)[:, None]
    slot = tl.arange(0, PADDED_K)[None, :]
    real = (token < tokens) & (slot < TOP_K)
    chosen = nearest_expert(tl.load(index + token * TOP_K + slot, mask=real, other=0), EXPERTS)
    return tl.min(tl.where(real & (chosen == e), token * TOP_K + slot, 1 << 30), 1)


@triton.jit
def few_gate_up(
    x,  # [T, H]
    index,  # [T, k] int32
    weight,  # [T, k] float32
    w,
    scale,
    bias,
    inner,  # [T * k, I], written
    tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
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
    e = nearest_expert(tl.load(index + tl.program_id(1)), EXPERTS)
    row = rows_of(index, e, tokens, EXPERTS, TOP_K, PADDED_K, BM)
    if tl.min(row, 0) != tl.program_id(1):
        return
    mask = row < tokens * TOP_K
    factor = tl.zeros([BM], tl.float32)
    if SCALES_INPUT:
        factor = tl.load(weight + row, mask=mask, other=0.0)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    out = gate_up_tile(
        x, tl.arange(0, BM).to(tl.int64) * HIDDEN, mask, factor, w, scale, bias, e.to(tl.int64), n,
        HIDDEN, INNER, ACTIVATION, GATED, ALPHA, LIMIT, SCALES_INPUT, HAS_BIASES, WEIGHTS, BLOCK,
        BM, BN, BK, NATIVE_FP8, INTERPRETED,
    )  # fmt: skip
    pointer = inner + row[:, None] * INNER + n[None, :]
    tl.store(pointer, out.to(inner.dtype.element_ty), mask=mask[:, None] & (n < INNER)[None, :])


@triton.jit
def few_down(
    inner,  # [T * k, I]
    index,  # [T, k] int32
    w,
    scale,
    bias,
    out,  # [T * k, H], written
    tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
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
    e = nearest_expert(tl.load(index + tl.program_id(1)), EXPERTS)
    row = rows_of(index, e, tokens, EXPERTS, TOP_K, PADDED_K, BM)
    if tl.min(row, 0) != tl.program_id(1):
        return
    mask = row < tokens * TOP_K
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = down_tile(
        inner, row.to(tl.int64) * INNER, mask, w, scale, bias, e.to(tl.int64), n,
        HIDDEN, INNER, HAS_BIASES, WEIGHTS, BLOCK, BM, BN, BK, NATIVE_FP8, INTERPRETED,
    )  # fmt: skip
    pointer = out + row[:, None] * HIDDEN + n[None, :]
    tl.store(pointer, acc.to(out.dtype.element_ty), mask=mask[:, None] & (n < HIDDEN)[None, :])


@triton.jit
def single_down(
    inner,  # [k, I]
    index,  # [1, k] int32
    weight,  # [1, k] float32
    w,  # [E, H, I]
    scale,
    bias,
    y,  # [1, H], written: the sum over the token's experts
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
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
    """One loop over all experts, so that loads are never waited for between two of them."""
    BLOCKS: tl.constexpr = (INNER + BLOCK - 1) // BLOCK
    WHOLE: tl.constexpr = INNER if WEIGHTS == "" else BLOCKS * BLOCK
    STEPS: tl.constexpr = (WHOLE + BK - 1) // BK
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(column, HIDDEN - 1)
    line = tl.arange(0, BM)
    offset = tl.zeros([BM], tl.int64)
    acc = tl.zeros([BM, BN], tl.float32)  # of one expert; all but the first row are zeros
    total = tl.zeros([BM, BN], tl.float32)
    # Read one step ahead: weights that wait for an index read in their own step are copied ahead less far.
    e = nearest_expert(tl.load(index), EXPERTS)
    factor = tl.load(weight)
    for step in range(TOP_K * STEPS):
        part = step % STEPS
        rows = load_rows(inner + step // STEPS * INNER, offset, line == 0, part, INNER, BK, WEIGHTS, BLOCK)
        expert = w + e.to(tl.int64) * (HIDDEN * WHOLE // (2 if WEIGHTS == "int4" else 1))
        expert_scale = scale
        if WEIGHTS != "":
            expert_scale = scale + e.to(tl.int64) * (scale_rows(HIDDEN) * BLOCKS)
        acc = add_product(
            acc, rows, expert, expert_scale, n, part, HIDDEN, INNER, BN, BK, WEIGHTS, BLOCK, NATIVE_FP8, INTERPRETED
        )
        last = part == STEPS - 1
        total += tl.where(last, acc if SCALES_INPUT else acc * factor, 0.0)
        acc = tl.where(last, 0.0, acc)
        after = tl.minimum((step + 1) // STEPS, TOP_K - 1)
        e = nearest_expert(tl.load(index + after), EXPERTS)
        factor = tl.load(weight + after)
    out = tl.sum(total, 0)
    if HAS_BIASES:
        for j in tl.static_range(TOP_K):
            chosen = nearest_expert(tl.load(index + j), EXPERTS).to(tl.int64)
            value = tl.load(bias + chosen * HIDDEN + n).to(tl.float32)
            if not SCALES_INPUT:
                value *= tl.load(weight + j)
            out += value
    tl.store(y + column, out.to(y.dtype.element_ty), mask=column < HIDDEN)
