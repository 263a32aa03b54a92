"""Attention among the patches of each image: rotated queries and keys, then flash attention (Dao 2023).

A head is two parts, see `heads`: one of 72 dimensions is a tile of 64 and one of 16, not one of 128.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.blocks import multiply
from moevlm.plugins.gpu.kernels.attention.heads import load_heads
from moevlm.plugins.gpu.kernels.attention.segments import rows_of_tile
from moevlm.plugins.gpu.kernels.attention.softmax import include


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
    cos,  # [T, H.dim / 2] float32
    sin,
    turned,  # [2 * HEADS, T, H.dim], written: queries times SCALE, then keys
    patches,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
):
    """BM patches of one head's queries or keys."""
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
    rows,  # how many rows are real; the others are zeros
    BEGIN: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """COLUMNS of a head from BEGIN on: [BLOCK, COLUMNS]."""
    row = tl.arange(0, BLOCK)
    column = BEGIN + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < DIM)[None, :]
    return tl.load(x + row[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_block(
    y,
    value,
    rows,
    BEGIN: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What `load_block` would load."""
    row = tl.arange(0, BLOCK)
    column = BEGIN + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < DIM)[None, :]
    tl.store(y + row[:, None] * STRIDE + column[None, :], value.to(y.dtype.element_ty), mask=mask)


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
    INTERPRETED: tl.constexpr,
):
    """BM queries of one head of one image."""
    STRIDE: tl.constexpr = 3 * HEADS * H.dim
    _, start, stop, first = rows_of_tile(image_start, tl.program_id(0), images, patches, BM)
    if first >= stop:
        return
    head = tl.program_id(1).to(tl.int64)
    queries = turned + (head * patches + first) * H.dim
    q = load_block(queries, stop - first, 0, H.first, H.dim, H.dim, BM)
    acc = tl.zeros([BM, H.first], tl.float32)
    q_rest = q
    acc_rest = acc
    if H.rest > 0:
        q_rest = load_block(queries, stop - first, H.first, H.rest, H.dim, H.dim, BM)
        acc_rest = tl.zeros([BM, H.rest], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for block in range((stop - start + BN - 1) // BN):
        rows = stop - start - block * BN
        row = (start + block * BN).to(tl.int64)
        keys = turned + ((HEADS + head) * patches + row) * H.dim
        scores = tl.zeros([BM, BN], tl.float32)
        k = load_block(keys, rows, 0, H.first, H.dim, H.dim, BN)
        scores = multiply(q, tl.trans(k), scores, INTERPRETED)
        if H.rest > 0:
            k = load_block(keys, rows, H.first, H.rest, H.dim, H.dim, BN)
            scores = multiply(q_rest, tl.trans(k), scores, INTERPRETED)
        if rows < BN:  # the last block alone: a select for each score is a sixth of what is done with it
            scores = tl.where((tl.arange(0, BN) < rows)[None, :], scores, float("-inf"))
        weight, top, total, fade = include(scores, top, total)
        weight = weight.to(qkv.dtype.element_ty)
        values = qkv + row * STRIDE + (2 * HEADS + head) * H.dim
        v = load_block(values, rows, 0, H.first, STRIDE, H.dim, BN)
        acc = multiply(weight, v, acc * fade[:, None], INTERPRETED)
        if H.rest > 0:
            v = load_block(values, rows, H.first, H.rest, STRIDE, H.dim, BN)
            acc_rest = multiply(weight, v, acc_rest * fade[:, None], INTERPRETED)
    line = y + first.to(tl.int64) * (HEADS * H.dim) + head * H.dim
    store_block(line, acc / total[:, None], stop - first, 0, H.first, HEADS * H.dim, H.dim, BM)
    if H.rest > 0:
        store_block(line, acc_rest / total[:, None], stop - first, H.first, H.rest, HEADS * H.dim, H.dim, BM)
