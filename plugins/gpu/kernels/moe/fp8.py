"""Grouped products of e4m3 by e4m3 (W8A8): activations are quantized as they come, by row and group of columns.

A product of one group is summed in float32 by itself, then scaled: Hopper's tensor cores keep fewer bits in longer
sums. x is quantized by a kernel of its own, the middle of an expert where gate_up ends.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.e4m3 import encode_fp8
from moevlm.plugins.gpu.kernels.moe.grouped import block_rows, routed_rows
from moevlm.plugins.gpu.kernels.moe.products import (
    expert_scales,
    expert_weights,
    finish_gate_up,
    inner_of,
    load_codes,
    load_factor,
    store_tile,
)
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def e4m3(codes):
    """A pointer to codes in int8 as one to numbers: read as such, they reach the tensor cores without registers."""
    return codes.to(tl.pointer_type(tl.float8e4nv))


@triton.jit
def load_group(x, offset, mask, group, COLUMNS: tl.constexpr):
    """One group of the rows that begin at `offset`: [BM, COLUMNS] e4m3."""
    column = group * COLUMNS + tl.arange(0, COLUMNS)
    return tl.load(e4m3(x) + offset[:, None] + column[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def quantize(values):
    """values [R, groups, columns] float32 -> e4m3 codes as int8, and scales [R, groups]: the largest becomes 448."""
    scale = tl.max(tl.abs(values), 2) / 448
    divisor = tl.where(scale == 0, 1.0, scale)
    return encode_fp8(values / divisor[:, :, None]), scale


@triton.jit
def quantize_rows(
    x,  # [T, W.width]
    codes,  # [T, W.stored_width] int8, written
    scale,  # [T, W.groups] float32, written
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A program takes GROUPS groups of a row."""
    wait_for_previous(OVERLAPS)
    PARTS: tl.constexpr = (W.groups + GROUPS - 1) // GROUPS
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    group = (tl.program_id(0) % PARTS) * GROUPS + tl.arange(0, GROUPS)
    column = (group[:, None] * W.group + tl.arange(0, W.group)[None, :])[None, :, :]
    values = tl.load(x + row * W.width + column, mask=column < W.width, other=0.0)
    code, found = quantize(values.to(tl.float32))
    tl.store(codes + row * W.stored_width + column, code, mask=column < W.stored_width)
    tl.store(scale + row * W.groups + group[None, :], found, mask=group[None, :] < W.groups)


@triton.jit
def add_scaled(acc, rows, row_scale, w, scale, n, group, W: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc [BM, BN] + the group's rows [BM, W.group] times those of w, both e4m3, times their scales."""
    code = load_codes(e4m3(w), n, group, W.stored_width, W.group)
    if INTERPRETED:
        product = tl.dot(rows.to(tl.float32), tl.trans(code.to(tl.float32)), input_precision="ieee")
    else:
        product = tl.dot(rows, tl.trans(code))
    factor = load_factor(scale, n, group, W, W.group).to(tl.float32)
    return acc + product * row_scale[:, None] * tl.trans(factor)


@triton.jit
def fp8_gate_up(
    x,  # [T, W.stored_width] e4m3 as int8
    x_scale,  # [T, W.groups] float32
    weight,  # [T, k] float32
    w,
    scale,
    bias,
    rows,  # [T * k] int32: rows by expert
    starts,  # [2, E + 1] int32
    blocks,  # [.., 2] int32
    inner,  # [T * k, I rounded up to groups] e4m3 as int8, written in the order of `rows`
    inner_scale,  # [T * k, groups of I] float32, written
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SPEC: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    INNER: tl.constexpr = inner_of(W, SPEC)
    GROUPS: tl.constexpr = (INNER + W.group - 1) // W.group
    TILES: tl.constexpr = (INNER + TILE.BN - 1) // TILE.BN
    block = tl.program_id(0) // TILES
    wait_for_previous(OVERLAPS)
    if block >= tl.load(starts + 2 * EXPERTS + 1):
        return
    e, place, mask = block_rows(starts, blocks, block, TILE.BM)
    row, factor = routed_rows(rows, weight, place, mask, SPEC, TILE.BM)
    token = (row // TOP_K).to(tl.int64)
    column = (tl.program_id(0) % TILES) * TILE.BN + tl.arange(0, TILE.BN)
    n = tl.minimum(column, INNER - 1)
    w, scale = expert_weights(w, e, W), expert_scales(scale, e, W)
    gate = tl.zeros([TILE.BM, TILE.BN], tl.float32)
    up = tl.zeros([TILE.BM, TILE.BN], tl.float32)
    for group in tl.range(W.groups, num_stages=TILE.stages):
        code = load_group(x, token * W.stored_width, mask, group, W.group)
        row_scale = tl.load(x_scale + token * W.groups + group, mask=mask, other=0.0)
        gate = add_scaled(gate, code, row_scale, w, scale, n, group, W, INTERPRETED)
        if SPEC.gated:
            up = add_scaled(up, code, row_scale, w, scale, n + INNER, group, W, INTERPRETED)
    out = finish_gate_up(gate, up, factor, bias, e, n, SPEC, W)
    out = tl.where((column < INNER)[None, :], out, 0.0)
    codes, found = quantize(tl.reshape(out, (TILE.BM, TILE.BN // W.group, W.group)))
    place = place.to(tl.int64)[:, None]
    stored = column[None, :]
    pointer = inner + place * (GROUPS * W.group) + stored
    tl.store(pointer, tl.reshape(codes, (TILE.BM, TILE.BN)), mask=mask[:, None] & (stored < GROUPS * W.group))
    g = ((tl.program_id(0) % TILES) * (TILE.BN // W.group) + tl.arange(0, TILE.BN // W.group))[None, :]
    tl.store(inner_scale + place * GROUPS + g, found, mask=mask[:, None] & (g < GROUPS))


@triton.jit
def fp8_down(
    inner,  # [T * k, W.stored_width] e4m3 as int8, in the order of `rows`
    inner_scale,  # [T * k, W.groups] float32
    w,
    scale,
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
    place = place.to(tl.int64)
    column = (tl.program_id(0) % TILES) * TILE.BN + tl.arange(0, TILE.BN)
    n = tl.minimum(column, W.rows - 1)
    w, scale = expert_weights(w, e, W), expert_scales(scale, e, W)
    acc = tl.zeros([TILE.BM, TILE.BN], tl.float32)
    for group in tl.range(W.groups, num_stages=TILE.stages):
        code = load_group(inner, place * W.stored_width, mask, group, W.group)
        row_scale = tl.load(inner_scale + place * W.groups + group, mask=mask, other=0.0)
        acc = add_scaled(acc, code, row_scale, w, scale, n, group, W, INTERPRETED)
    if W.has_bias:
        acc += tl.load(bias + e * W.rows + n).to(tl.float32)[None, :]
    store_tile(out, row, column, acc, mask, W.rows)
