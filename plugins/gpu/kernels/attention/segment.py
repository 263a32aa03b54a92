"""Attention among the patches of each image: rotated queries and keys, then flash attention (Dao 2023).

A head is two parts, see `heads`: one of 72 dimensions is a tile of 64 and one of 16, not one of 128.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.blocks import multiply
from moevlm.plugins.gpu.kernels.attention.heads import load_heads
from moevlm.plugins.gpu.kernels.attention.segments import rows_of_tile
from moevlm.plugins.gpu.kernels.attention.softmax import include
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def rotate_part(
    qkv,
    cos,
    sin,
    out,  # [BM] pointers: where each row goes
    offset,  # [BM] int64: where it is in qkv
    row,  # [BM] int32: whose cos and sin
    mask,  # [BM]
    scale,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    H: tl.constexpr,
):
    value = load_heads(qkv, offset, mask, row, cos, sin, cos, FIRST, WIDTH, H)
    d = FIRST + tl.arange(0, WIDTH)
    value = (value * scale).to(out.dtype.element_ty)
    tl.store(out[:, None] + d[None, :], value, mask=mask[:, None] & (d < H.dim)[None, :])


@triton.jit
def rotate_patches(
    qkv,  # [T, 3 * HEADS * H.dim]
    cos,  # [T, H.half] float32
    sin,
    turned,  # [2 * HEADS, T, H.dim], written: queries times SCALE, then keys
    patches,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """BM patches of one head's queries or keys."""
    wait_for_previous(OVERLAPS)
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    mask = row < patches
    offset = row.to(tl.int64) * (3 * HEADS * H.dim) + head * H.dim
    scale = tl.where(head < HEADS, SCALE, 1.0)
    out = turned + (head.to(tl.int64) * patches + row) * H.dim
    rotate_part(qkv, cos, sin, out, offset, row, mask, scale, 0, H.first, H)
    if H.rest > 0:
        rotate_part(qkv, cos, sin, out, offset, row, mask, scale, H.first, H.rest, H)


@triton.jit
def load_block(
    x,  # one head of the block's first row
    rows,  # how many rows are real, if SHORT; the others are zeros
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    SHORT: tl.constexpr,
):
    """WIDTH dimensions of a head from FIRST on: [BLOCK, WIDTH]."""
    row = tl.arange(0, BLOCK)
    d = FIRST + tl.arange(0, WIDTH)
    pointer = x + row[:, None] * STRIDE + d[None, :]
    if SHORT:
        block = tl.load(pointer, mask=(row < rows)[:, None] & (d < H.dim)[None, :], other=0.0)
    elif H.dim < FIRST + WIDTH:
        block = tl.load(pointer, mask=(d < H.dim)[None, :], other=0.0)
    else:
        block = tl.load(pointer)
    return block


@triton.jit
def store_block(
    y,
    value,
    rows,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What `load_block` would load, if SHORT."""
    row = tl.arange(0, BLOCK)
    d = FIRST + tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (d < H.dim)[None, :]
    tl.store(y + row[:, None] * STRIDE + d[None, :], value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def attend(
    query,  # [BM, H.first]
    query_rest,  # [BM, H.rest]
    keys,  # one head's, of rows KEY_STRIDE apart, from the block's first
    values,  # one head's, of rows VALUE_STRIDE apart
    rows,  # how many the block has, if SHORT
    top,  # [BM] float32
    total,  # [BM] float32
    acc,  # [BM, H.first] float32
    acc_rest,  # [BM, H.rest] float32
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SHORT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """top, total, acc and acc_rest with BN keys more."""
    score = tl.zeros([BM, BN], tl.float32)
    key = load_block(keys, rows, 0, H.first, KEY_STRIDE, H, BN, SHORT)
    score = multiply(query, tl.trans(key), score, INTERPRETED)
    if H.rest > 0:
        key = load_block(keys, rows, H.first, H.rest, KEY_STRIDE, H, BN, SHORT)
        score = multiply(query_rest, tl.trans(key), score, INTERPRETED)
    if SHORT:
        score = tl.where((tl.arange(0, BN) < rows)[None, :], score, float("-inf"))
    power, top, total, shrink = include(score, top, total)
    power = power.to(values.dtype.element_ty)
    value = load_block(values, rows, 0, H.first, VALUE_STRIDE, H, BN, SHORT)
    acc = multiply(power, value, acc * shrink[:, None], INTERPRETED)
    if H.rest > 0:
        value = load_block(values, rows, H.first, H.rest, VALUE_STRIDE, H, BN, SHORT)
        acc_rest = multiply(power, value, acc_rest * shrink[:, None], INTERPRETED)
    return top, total, acc, acc_rest


@triton.jit
def attend_rows(
    query,  # [BM, H.first], times the scores' scale in base 2
    query_rest,  # [BM, H.rest]
    keys,  # one head's, of rows KEY_STRIDE apart
    values,  # one head's, of rows VALUE_STRIDE apart
    start,
    stop,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What the queries find in rows `start` to `stop`: [BM, H.first] and, if H.rest, [BM, H.rest], float32."""
    acc = tl.zeros([BM, H.first], tl.float32)
    acc_rest = acc
    if H.rest > 0:
        acc_rest = tl.zeros([BM, H.rest], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    # A short last block has a loop of its own, so that the other loop has no masks: a fifth of its instructions. As a
    # loop, for its loads to be copied ahead, too, and first, where that takes fewer registers.
    whole = (stop - start) // BN
    for short in tl.static_range(1, -1, -1):
        for block in range(whole if short else 0, (stop - start + BN - 1) // BN if short else whole):
            row = start + block * BN
            # A head's keys side by side are less than 2 ** 31 values; 64 bits would take a register more.
            key_row = row if H.dim == KEY_STRIDE else row.to(tl.int64)
            top, total, acc, acc_rest = attend(
                query, query_rest, keys + key_row * KEY_STRIDE, values + row.to(tl.int64) * VALUE_STRIDE,
                stop - row, top, total, acc, acc_rest, KEY_STRIDE, VALUE_STRIDE, H, BM, BN, short == 1, INTERPRETED,
            )  # fmt: skip
    return acc / total[:, None], acc_rest / total[:, None]


@triton.jit
def segment_attention(
    qkv,  # [T, 3 * HEADS * H.dim], of which the values are read
    turned,  # [2 * HEADS, T, H.dim]
    image_start,  # [N + 1] int32
    y,  # [T, HEADS * H.dim], written
    patches,
    images,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """BM queries of one head of one image."""
    STRIDE: tl.constexpr = 3 * HEADS * H.dim
    _, start, stop, first = rows_of_tile(image_start, tl.program_id(0), images, patches, BM)
    wait_for_previous(OVERLAPS)  # `image_start` is older than the rotation
    if first >= stop:
        return
    head = tl.program_id(1).to(tl.int64)
    queries = turned + (head * patches + first) * H.dim
    query = load_block(queries, stop - first, 0, H.first, H.dim, H, BM, True)
    query_rest = query
    if H.rest > 0:
        query_rest = load_block(queries, stop - first, H.first, H.rest, H.dim, H, BM, True)
    keys = turned + (HEADS + head) * patches * H.dim
    values = qkv + (2 * HEADS + head) * H.dim
    acc, acc_rest = attend_rows(query, query_rest, keys, values, start, stop, H.dim, STRIDE, H, BM, BN, INTERPRETED)
    out = y + first.to(tl.int64) * (HEADS * H.dim) + head * H.dim
    store_block(out, acc, stop - first, 0, H.first, HEADS * H.dim, H, BM)
    if H.rest > 0:
        store_block(out, acc_rest, stop - first, H.first, H.rest, HEADS * H.dim, H, BM)
