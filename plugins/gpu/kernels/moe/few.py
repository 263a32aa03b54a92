"""Experts for 1 to 8 tokens, where reading weights is all the time: each active expert's are read once, unsorted.

A program is (columns of an expert, a routed row). The first row of an expert computes for all tokens that chose it; the
others exit. Tokens take the rows of one matrix tile, which has room for 16. A token must not choose an expert twice:
where one does, as the router lets a token whose logits are not numbers, its own output is undefined, and no other's.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.moe.indices import is_expert, nearest_expert
from moevlm.plugins.gpu.kernels.moe.products import (
    add_product,
    down_tile,
    expert_scales,
    expert_weights,
    expert_zeros,
    gate_up_tile,
    inner_of,
    load_row_scales,
    load_rows,
    store_tile,
)
from moevlm.plugins.gpu.kernels.overlap import prefetch_rows, wait_for_previous

PREFETCHED = tl.constexpr(2)  # experts of a token whose weights are asked for before the launch before has ended


@triton.jit
def prefetch_expert(w, e, n, W: tl.constexpr):
    """Rows n of expert e."""
    BITS: tl.constexpr = 4 if W.quarters else w.dtype.element_ty.primitive_bitwidth
    prefetch_rows(expert_weights(w, e.to(tl.int64), W), n, W.stored_width * BITS // 8)


@triton.jit
def rows_of(index, e, tokens, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BM: tl.constexpr):
    """For each token, its row that goes to expert e; a large number if none does: [BM]."""
    token = tl.arange(0, BM)[:, None]
    slot = tl.arange(0, triton.next_power_of_2(TOP_K))[None, :]
    real = (token < tokens) & (slot < TOP_K)
    chosen = tl.load(index + token * TOP_K + slot, mask=real, other=-1)
    goes = is_expert(chosen) & (nearest_expert(chosen, EXPERTS) == e)
    return tl.min(tl.where(goes, token * TOP_K + slot, 1 << 30), 1)


@triton.jit
def few_gate_up(
    x,  # [T, H]
    index,  # [T, k] int32
    weight,  # [T, k] float32
    w,
    scale,
    zero,
    row_scale,
    bias,
    inner,  # [T * k, I], written
    tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SPEC: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    INNER: tl.constexpr = inner_of(W, SPEC)
    wait_for_previous(OVERLAPS)
    chosen = tl.load(index + tl.program_id(1))
    if not is_expert(chosen):
        return
    e = nearest_expert(chosen, EXPERTS)
    row = rows_of(index, e, tokens, EXPERTS, TOP_K, TILE.BM)
    if tl.min(row, 0) != tl.program_id(1):
        return
    mask = row < tokens * TOP_K
    factor = tl.zeros([TILE.BM], tl.float32)
    if SPEC.weight_on == "input":
        factor = tl.load(weight + row, mask=mask, other=0.0)
    n = tl.program_id(0) * TILE.BN + tl.arange(0, TILE.BN)
    offset = tl.arange(0, TILE.BM).to(tl.int64) * W.width
    out = gate_up_tile(
        x, offset, mask, factor, w, scale, zero, row_scale, bias, e.to(tl.int64), n, SPEC, W, TILE, INTERPRETED
    )
    store_tile(inner, row, n, out, mask, INNER)


@triton.jit
def few_down(
    inner,  # [T * k, I]
    index,  # [T, k] int32
    w,
    scale,
    zero,
    row_scale,
    bias,
    out,  # [T * k, H], written
    tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    chosen = tl.load(index + tl.program_id(1))
    if not is_expert(chosen):
        return
    e = nearest_expert(chosen, EXPERTS)
    row = rows_of(index, e, tokens, EXPERTS, TOP_K, TILE.BM)
    if tl.min(row, 0) != tl.program_id(1):
        return
    mask = row < tokens * TOP_K
    n = tl.program_id(0) * TILE.BN + tl.arange(0, TILE.BN)
    # `index` is older than gate_up, with which this launch overlaps.
    if OVERLAPS:
        prefetch_expert(w, e, tl.minimum(n, W.rows - 1), W)
    wait_for_previous(OVERLAPS)
    offset = row.to(tl.int64) * W.width
    acc = down_tile(inner, offset, mask, w, scale, zero, row_scale, bias, e.to(tl.int64), n, W, TILE, INTERPRETED)
    store_tile(out, row, n, acc, mask, W.rows)


@triton.jit
def single_down(
    inner,  # [k, I]
    index,  # [1, k] int32
    weight,  # [1, k] float32
    w,  # [E, H, I]
    scale,
    zero,
    row_scale,
    bias,
    y,  # [1, H], written: the sum over the token's experts
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SPEC: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One loop over all experts, so that loads are never waited for between two of them."""
    STEPS: tl.constexpr = (W.stored_width + TILE.BK - 1) // TILE.BK
    SCALES_INPUT: tl.constexpr = SPEC.weight_on == "input"
    column = tl.program_id(0) * TILE.BN + tl.arange(0, TILE.BN)
    n = tl.minimum(column, W.rows - 1)
    line = tl.arange(0, TILE.BM)
    offset = tl.zeros([TILE.BM], tl.int64)
    slot = tl.arange(0, triton.next_power_of_2(TOP_K))
    every = tl.load(index + slot, mask=slot < TOP_K, other=-1)
    any_expert = is_expert(tl.max(every, 0))
    # `index` is older than gate_up, with which this launch overlaps.
    if OVERLAPS:  # noqa: SIM102 - known when the kernel is compiled, and the other is not
        if any_expert:
            for j in tl.static_range(PREFETCHED if PREFETCHED < TOP_K else TOP_K):
                prefetch_expert(w, nearest_expert(tl.load(index + j), EXPERTS), n, W)
    wait_for_previous(OVERLAPS)
    if not any_expert:  # no weights are read
        tl.store(y + column, tl.zeros([TILE.BN], y.dtype.element_ty), mask=column < W.rows)
        return
    acc = tl.zeros([TILE.BM, TILE.BN], tl.float32)  # of one expert; all but the first row are zeros
    total = tl.zeros([TILE.BM, TILE.BN], tl.float32)
    if W.row_scales:  # all before the loop, in which a load would be waited for
        place = nearest_expert(every, EXPERTS).to(tl.int64) * W.rows
        of_rows = load_row_scales(row_scale, place[:, None] + n[None, :], W)
    # Read one step ahead: weights that wait for an index read in their own step are copied ahead less far.
    first = tl.load(index)
    e, lead = nearest_expert(first, EXPERTS), tl.minimum(first, 0)  # a row of no expert is as good as zeros
    factor = tl.load(weight)
    for step in range(TOP_K * STEPS):
        part = step % STEPS
        rows = load_rows(inner + step // STEPS * W.width, offset, line == lead, part, W, TILE.BK)
        wide = e.to(tl.int64)
        expert, scales, zeros = expert_weights(w, wide, W), expert_scales(scale, wide, W), expert_zeros(zero, wide, W)
        acc = add_product(acc, rows, expert, scales, zeros, n, part, W, TILE, INTERPRETED)
        last = part == STEPS - 1
        whole = acc
        if W.row_scales:
            whole *= tl.sum(tl.where((slot == step // STEPS)[:, None], of_rows, 0.0), 0)[None, :]
        total += tl.where(last, whole if SCALES_INPUT else whole * factor, 0.0)
        acc = tl.where(last, 0.0, acc)
        after = tl.minimum((step + 1) // STEPS, TOP_K - 1)
        following = tl.load(index + after)
        e, lead = nearest_expert(following, EXPERTS), tl.minimum(following, 0)
        factor = tl.load(weight + after)
    out = tl.sum(total, 0)
    if W.has_bias:
        for j in tl.static_range(TOP_K):
            chosen = tl.load(index + j)
            place = nearest_expert(chosen, EXPERTS).to(tl.int64) * W.rows
            value = tl.where(is_expert(chosen), tl.load(bias + place + n).to(tl.float32), 0.0)
            if not SCALES_INPUT:
                value *= tl.load(weight + j)
            out += value
    tl.store(y + column, out.to(y.dtype.element_ty), mask=column < W.rows)
