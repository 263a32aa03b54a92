"""Rows times an expert's weights, whatever their format, and what follows: the inside of every experts kernel.

Weights are read in steps of BK input columns. WEIGHTS names their format, in blocks of BLOCK columns; the layout of a
block is stated in `moevlm.plugins.gpu.packing`. An int4 step is two halves: the columns that the low halves of its
bytes stand for, and those of the high ones.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    x,
    offset,
    mask,
    k0,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Columns of one step, from x [.., WIDTH] at offset [BM] where mask [BM] says so: [BM, BK], or [BM, BK / 2]."""
    if WEIGHTS == "int4":
        HALF: tl.constexpr = BLOCK // 2
        j = tl.arange(0, BK // 2)
        if BK >= BLOCK:
            column = k0 + (j // HALF) * BLOCK + j % HALF + HIGH * HALF
        else:
            column = (k0 // BLOCK) * BLOCK + (k0 % BLOCK) // 2 + j + HIGH * HALF
    else:
        column = k0 + tl.arange(0, BK)
    pointer = x + offset[:, None] + column[None, :]
    if WIDTH % BK == 0:
        return tl.load(pointer, mask=mask[:, None], other=0.0)
    return tl.load(pointer, mask=mask[:, None] & (column[None, :] < WIDTH), other=0.0)


@triton.jit
def decode(code, dtype: tl.constexpr, WEIGHTS: tl.constexpr):
    """Stored integers as numbers before scaling. fp8 comes out divided by 256: its scales are stored times that."""
    if WEIGHTS == "fp8":
        bits = code.to(tl.int16)
        bits = (bits & 0x7F) << 7 | (bits & 0x80) << 8
        return bits.to(tl.float16, bitcast=True).to(dtype)
    return code.to(dtype)


@triton.jit
def scaled(value, scale, BN: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """value [BN, COLUMNS], in BLOCKS equal parts, each times its scale [BN, BLOCKS]."""
    if BLOCKS == 1:
        return value * scale
    parts = tl.reshape(value, (BN, BLOCKS, COLUMNS // BLOCKS)) * scale[:, :, None]
    return tl.reshape(parts, (BN, COLUMNS))


@triton.jit
def add_product(
    acc,  # [BM, BN] float32
    low,  # [BM, BK], or [BM, BK / 2] and high the other half
    high,
    w,  # one expert's weights [.., stored width]
    scale,  # its scales [.., blocks]
    n,  # [BN]: which of its rows
    k0,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """acc + the step's rows times weights."""
    dtype: tl.constexpr = tl.float32 if INTERPRETED else low.dtype
    if WEIGHTS == "":
        column = k0 + tl.arange(0, BK)
        pointer = w + n[:, None] * WIDTH + column[None, :]
        if WIDTH % BK == 0:
            value = tl.load(pointer)
        else:
            value = tl.load(pointer, mask=column[None, :] < WIDTH, other=0.0)
        return tl.dot(low.to(dtype), tl.trans(value.to(dtype)), acc, input_precision="ieee")
    ALL_BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = BK // BLOCK if BK > BLOCK else 1
    PER_BYTE: tl.constexpr = 2 if WEIGHTS == "int4" else 1
    STORED: tl.constexpr = ALL_BLOCKS * BLOCK // PER_BYTE
    COLUMNS: tl.constexpr = BK // PER_BYTE
    column = k0 // PER_BYTE + tl.arange(0, COLUMNS)
    pointer = w + n[:, None] * STORED + column[None, :]
    block = k0 // BLOCK + tl.arange(0, BLOCKS)
    scale_pointer = scale + n[:, None] * ALL_BLOCKS + block[None, :]
    if STORED % COLUMNS == 0:
        code = tl.load(pointer)
        factor = tl.load(scale_pointer).to(dtype)
    else:
        code = tl.load(pointer, mask=column[None, :] < STORED, other=0)
        factor = tl.load(scale_pointer, mask=block[None, :] < ALL_BLOCKS, other=0.0).to(dtype)
    if WEIGHTS == "int4":
        value = scaled(decode((code << 4) >> 4, dtype, WEIGHTS), factor, BN, BLOCKS, COLUMNS)
        acc = tl.dot(low.to(dtype), tl.trans(value), acc, input_precision="ieee")
        value = scaled(decode(code >> 4, dtype, WEIGHTS), factor, BN, BLOCKS, COLUMNS)
        return tl.dot(high.to(dtype), tl.trans(value), acc, input_precision="ieee")
    value = scaled(decode(code, dtype, WEIGHTS), factor, BN, BLOCKS, COLUMNS)
    return tl.dot(low.to(dtype), tl.trans(value), acc, input_precision="ieee")


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The middle of an expert, in float32."""
    if ACTIVATION == "swiglu_clamped":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return gate * tl.sigmoid(ALPHA * gate) * (up + 1)
    if ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) = sigmoid(2 * z), z = sqrt(2 / pi) * (..)
        out = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        out = gate * tl.sigmoid(gate)
    if GATED:
        out *= up
    return out


@triton.jit
def gate_up_tile(
    x,  # [T, H]
    offset,  # [BM] int64: where each row starts in x
    mask,  # [BM]: which rows are real
    factor,  # [BM] float32: the rows' routing weights, if they scale the input
    w,  # [E, R, H], R = 2I, gate rows first, or I
    scale,  # [E, R, blocks] or null
    bias,  # [E, R] or null
    e,  # int64: the expert
    n,  # [BN]: which of its I outputs; those beyond are computed as the last
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
    INTERPRETED: tl.constexpr,
):
    """activation(rows times gate_up): [BM, BN] float32."""
    ROWS: tl.constexpr = INNER * 2 if GATED else INNER
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    STORED: tl.constexpr = HIDDEN if WEIGHTS == "" else BLOCKS * BLOCK // (2 if WEIGHTS == "int4" else 1)
    w += e * (ROWS * STORED)
    if WEIGHTS != "":
        scale += e * (ROWS * BLOCKS)
    n = tl.minimum(n, INNER - 1)
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, HIDDEN, BK):
        low = load_rows(x, offset, mask, k0, HIDDEN, BK, WEIGHTS, BLOCK, 0)
        high = low
        if WEIGHTS == "int4":
            high = load_rows(x, offset, mask, k0, HIDDEN, BK, WEIGHTS, BLOCK, 1)
        gate = add_product(gate, low, high, w, scale, n, k0, HIDDEN, BN, BK, WEIGHTS, BLOCK, INTERPRETED)
        if GATED:
            up = add_product(up, low, high, w, scale, n + INNER, k0, HIDDEN, BN, BK, WEIGHTS, BLOCK, INTERPRETED)
    if SCALES_INPUT:  # the products are linear, so here instead of in the loop
        gate *= factor[:, None]
        up *= factor[:, None]
    if HAS_BIASES:
        gate += tl.load(bias + e * ROWS + n).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + e * ROWS + INNER + n).to(tl.float32)[None, :]
    return activate(gate, up, ACTIVATION, GATED, ALPHA, LIMIT)


@triton.jit
def down_tile(
    x,  # [rows, I]
    offset,
    mask,
    w,  # [E, H, I]
    scale,  # [E, H, blocks] or null
    bias,  # [E, H] or null
    e,
    n,  # [BN]: which of its H outputs
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    HAS_BIASES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """rows times down: [BM, BN] float32."""
    BLOCKS: tl.constexpr = (INNER + BLOCK - 1) // BLOCK
    STORED: tl.constexpr = INNER if WEIGHTS == "" else BLOCKS * BLOCK // (2 if WEIGHTS == "int4" else 1)
    w += e * (HIDDEN * STORED)
    if WEIGHTS != "":
        scale += e * (HIDDEN * BLOCKS)
    n = tl.minimum(n, HIDDEN - 1)
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, INNER, BK):
        low = load_rows(x, offset, mask, k0, INNER, BK, WEIGHTS, BLOCK, 0)
        high = low
        if WEIGHTS == "int4":
            high = load_rows(x, offset, mask, k0, INNER, BK, WEIGHTS, BLOCK, 1)
        acc = add_product(acc, low, high, w, scale, n, k0, INNER, BN, BK, WEIGHTS, BLOCK, INTERPRETED)
    if HAS_BIASES:
        acc += tl.load(bias + e * HIDDEN + n).to(tl.float32)[None, :]
    return acc
