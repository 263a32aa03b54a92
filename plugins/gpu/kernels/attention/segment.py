"""Attention among the patches of each image: rotated queries and keys, then flash attention (Dao 2023).

A head of 72 dimensions is a tile of 64 and one of 16, since a matrix tile takes powers of two alone: WIDE dimensions,
then NARROW, which is 0 where WIDE has room for all.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.segments import rows_of_tile


@triton.jit
def rotate_part(
    x,  # one head of the first patch
    cos,  # [T, DIM / 2] float32
    sin,
    out,  # [T, DIM], written
    row,  # [BM] int64
    real,  # [BM]: which rows are
    scale,
    BEGIN: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
):
    """COLUMNS of a head from BEGIN on; it turns as two halves."""
    HALF: tl.constexpr = DIM // 2
    column = BEGIN + tl.arange(0, COLUMNS)
    mask = real[:, None] & (column < DIM)[None, :]
    line = x + row[:, None] * STRIDE
    own = tl.load(line + column[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(line + ((column + HALF) % DIM)[None, :], mask=mask, other=0.0).to(tl.float32)
    angle = row[:, None] * HALF + (column % HALF)[None, :]
    turn = tl.load(sin + angle, mask=mask, other=0.0) * tl.where(column < HALF, -1.0, 1.0)[None, :]
    turned = (own * tl.load(cos + angle, mask=mask, other=0.0) + other * turn) * scale
    tl.store(out + row[:, None] * DIM + column[None, :], turned.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotate_patches(
    qkv,  # [T, 3 * HEADS * DIM]
    cos,  # [T, DIM / 2] float32
    sin,
    turned,  # [2 * HEADS, T, DIM], written: queries times SCALE, then keys
    patches,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
):
    """BM patches of one head's queries or keys."""
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    head = tl.program_id(1)
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    real = row < patches
    scale = tl.where(head < HEADS, SCALE, 1.0)
    turned += head.to(tl.int64) * patches * DIM
    rotate_part(qkv + head * DIM, cos, sin, turned, row, real, scale, 0, WIDE, STRIDE, DIM)
    if NARROW > 0:
        rotate_part(qkv + head * DIM, cos, sin, turned, row, real, scale, WIDE, NARROW, STRIDE, DIM)


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
def multiply(a, b, acc, INTERPRETED: tl.constexpr):
    """a times b + acc."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def segment_attention(
    qkv,  # [T, 3 * HEADS * DIM], of which the values are read
    turned,  # [2 * HEADS, T, DIM]
    image_start,  # [N + 1] int32
    y,  # [T, HEADS * DIM], written
    patches,
    images,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """BM queries of one head of one image."""
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    start, stop, first = rows_of_tile(image_start, tl.program_id(0), images, patches, BM)
    if first >= stop:
        return
    head = tl.program_id(1).to(tl.int64)
    queries = turned + (head * patches + first) * DIM
    q = load_block(queries, stop - first, 0, WIDE, DIM, DIM, BM)
    acc = tl.zeros([BM, WIDE], tl.float32)
    q_narrow = q
    acc_narrow = acc
    if NARROW > 0:
        q_narrow = load_block(queries, stop - first, WIDE, NARROW, DIM, DIM, BM)
        acc_narrow = tl.zeros([BM, NARROW], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for block in range((stop - start + BN - 1) // BN):
        rows = stop - start - block * BN
        row = (start + block * BN).to(tl.int64)
        keys = turned + ((HEADS + head) * patches + row) * DIM
        scores = tl.zeros([BM, BN], tl.float32)
        k = load_block(keys, rows, 0, WIDE, DIM, DIM, BN)
        scores = multiply(q, tl.trans(k), scores, INTERPRETED)
        if NARROW > 0:
            k = load_block(keys, rows, WIDE, NARROW, DIM, DIM, BN)
            scores = multiply(q_narrow, tl.trans(k), scores, INTERPRETED)
        if rows < BN:  # the last block alone: a select for each score is a sixth of what is done with it
            scores = tl.where((tl.arange(0, BN) < rows)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weight = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 1)
        top = higher
        weight = weight.to(qkv.dtype.element_ty)
        values = qkv + row * STRIDE + (2 * HEADS + head) * DIM
        v = load_block(values, rows, 0, WIDE, STRIDE, DIM, BN)
        acc = multiply(weight, v, acc * fade[:, None], INTERPRETED)
        if NARROW > 0:
            v = load_block(values, rows, WIDE, NARROW, STRIDE, DIM, BN)
            acc_narrow = multiply(weight, v, acc_narrow * fade[:, None], INTERPRETED)
    line = y + first.to(tl.int64) * (HEADS * DIM) + head * DIM
    store_block(line, acc / total[:, None], stop - first, 0, WIDE, HEADS * DIM, DIM, BM)
    if NARROW > 0:
        store_block(line, acc_narrow / total[:, None], stop - first, WIDE, NARROW, HEADS * DIM, DIM, BM)
