"""Rows times an expert's weights, whatever their format, and what follows: the inside of every experts kernel.

Weights are read in steps of BK input columns. WEIGHTS names their format, in blocks of BLOCK columns; the layout of a
block is stated in `moevlm.export.formats.gpu_packing`. A step of int4 is four parts, one for each 4 bits of a unit.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def scale_rows(rows):
    """How many scales of one group are stored for so many rows of a weight."""
    return (rows + 7) // 8 * 8


@triton.jit
def load_part(
    x,
    offset,
    mask,
    step,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if WEIGHTS == "int4":
        QUARTER: tl.constexpr = BLOCK // 4
        j = tl.arange(0, BK // 4)
        if BK >= BLOCK:
            column = step * BK + (j // QUARTER) * BLOCK + j % QUARTER + PART * QUARTER
        else:
            PARTS: tl.constexpr = BLOCK // BK
            column = (step // PARTS) * BLOCK + (step % PARTS) * (BK // 4) + j + PART * QUARTER
    else:
        column = step * BK + tl.arange(0, BK)
    pointer = x + offset[:, None] + column[None, :]
    if WIDTH % BK == 0 and (WEIGHTS == "" or WIDTH % BLOCK == 0):
        rows = tl.load(pointer, mask=mask[:, None], other=0.0)
    else:
        rows = tl.load(pointer, mask=mask[:, None] & (column[None, :] < WIDTH), other=0.0)
    return rows


@triton.jit
def load_rows(
    x,  # [.., WIDTH]
    offset,  # [BM]: where each row starts
    mask,  # [BM]: which rows are real; the others are zeros
    step,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The columns of one step: [BM, BK], for int4 four times [BM, BK / 4]."""
    if WEIGHTS == "int4":
        return (
            load_part(x, offset, mask, step, 0, WIDTH, BK, WEIGHTS, BLOCK),
            load_part(x, offset, mask, step, 1, WIDTH, BK, WEIGHTS, BLOCK),
            load_part(x, offset, mask, step, 2, WIDTH, BK, WEIGHTS, BLOCK),
            load_part(x, offset, mask, step, 3, WIDTH, BK, WEIGHTS, BLOCK),
        )
    else:
        return load_part(x, offset, mask, step, 0, WIDTH, BK, WEIGHTS, BLOCK)


@triton.jit
def decode_int4(units, PART: tl.constexpr, dtype: tl.constexpr):
    """Four bits of each 16-bit unit, less 8."""
    code = (units >> (4 * PART)) & 15
    # As the lowest bits of a number whose last place is worth 1: no conversion is needed, and the difference is exact.
    if dtype == tl.float16:
        value = (code | 0x6400).to(tl.float16, bitcast=True) - 1032
    elif dtype == tl.bfloat16:
        value = (code | 0x4300).to(tl.bfloat16, bitcast=True) - 136
    else:
        value = code.to(tl.float32) - 8
    return value


@triton.jit
def decode_fp8(code, dtype: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """e4m3 codes as numbers; without hardware for them, divided by 256."""
    if NATIVE_FP8:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        bits = code.to(tl.int16)
        value = ((bits & 0x7F) << 7 | (bits & 0x80) << 8).to(tl.float16, bitcast=True)
    return value.to(dtype)


@triton.jit
def scaled(value, factor, BN: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """value [BN, COLUMNS], in BLOCKS equal parts, each times its factor [BN, BLOCKS]."""
    if BLOCKS > 1:
        value = tl.reshape(value, (BN, BLOCKS, COLUMNS // BLOCKS)) * factor[:, :, None]
        value = tl.reshape(value, (BN, COLUMNS))
    else:
        value *= factor
    return value


@triton.jit
def load_factor(scale, n, step, ROWS: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr):
    """The scales of one step: [BN, blocks of the step], at least one."""
    STORED: tl.constexpr = scale_rows(ROWS)
    ALL: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    if BK > BLOCK:
        block = step * (BK // BLOCK) + tl.arange(0, BK // BLOCK)
    else:
        block = step * BK // BLOCK + tl.arange(0, 1)
    mask = block[None, :] < ALL
    if scale.dtype.element_ty == tl.float32:
        factor = tl.load(scale + block[None, :] * STORED + n[:, None], mask=mask, other=0.0)
    else:
        # Nothing below 4 bytes is copied asynchronously, so a row's scale is read with its neighbour's.
        words = scale.to(tl.pointer_type(tl.int32)) + block[None, :] * (STORED // 2)
        word = tl.load(words + (n // 2)[:, None], mask=mask, other=0)
        factor = (word >> (n % 2 * 16)[:, None]).to(tl.int16).to(scale.dtype.element_ty, bitcast=True)
    return factor


@triton.jit
def load_codes(w, n, step, STORED: tl.constexpr, COLUMNS: tl.constexpr):
    """One step of rows n of w [.., STORED]: [rows, COLUMNS]."""
    column = step * COLUMNS + tl.arange(0, COLUMNS)
    pointer = w + n[:, None] * STORED + column[None, :]
    if STORED % COLUMNS == 0:
        code = tl.load(pointer)
    else:
        code = tl.load(pointer, mask=column[None, :] < STORED, other=0)
    return code


@triton.jit
def multiply(rows, value, acc, INTERPRETED: tl.constexpr):
    """acc [BM, BN] float32 + rows [BM, n] times value [BN, n]."""
    if INTERPRETED:
        rows = rows.to(tl.float32)
        value = value.to(tl.float32)
    return tl.dot(rows, tl.trans(value), acc, input_precision="ieee")


@triton.jit
def add_product(
    acc,  # [BM, BN] float32
    rows,  # of this step, as `load_rows` returns them
    w,  # one expert's weights [ROWS, stored width]
    scale,  # its scales [blocks, scale_rows(ROWS)]
    n,  # [BN]: which of its rows
    step,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """acc + the step's rows times weights."""
    STORED: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK * BLOCK
    BLOCKS: tl.constexpr = BK // BLOCK if BK > BLOCK else 1
    if WEIGHTS == "":
        acc = multiply(rows, load_codes(w, n, step, WIDTH, BK), acc, INTERPRETED)
    else:
        factor = load_factor(scale, n, step, ROWS, WIDTH, BK, BLOCK)
        if INTERPRETED and factor.dtype == tl.bfloat16:
            factor = factor.to(tl.float32)
        if WEIGHTS == "int4":
            units = load_codes(w.to(tl.pointer_type(tl.int16)), n, step, STORED // 4, BK // 4)
            for part in tl.static_range(4):
                value = scaled(decode_int4(units, part, factor.dtype), factor, BN, BLOCKS, BK // 4)
                acc = multiply(rows[part], value, acc, INTERPRETED)
        else:
            code = load_codes(w, n, step, STORED, BK)
            if WEIGHTS == "fp8":
                value = decode_fp8(code, factor.dtype, NATIVE_FP8)
                if not NATIVE_FP8:
                    factor *= 256
            else:
                value = code.to(factor.dtype)
            acc = multiply(rows, scaled(value, factor, BN, BLOCKS, BK), acc, INTERPRETED)
    return acc


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
    scale,  # [E, blocks, scale_rows(R)] or null
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
    NATIVE_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """activation(rows times gate_up): [BM, BN] float32."""
    ROWS: tl.constexpr = INNER * 2 if GATED else INNER
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    WHOLE: tl.constexpr = HIDDEN if WEIGHTS == "" else BLOCKS * BLOCK
    w += e * (ROWS * WHOLE // (2 if WEIGHTS == "int4" else 1))
    if WEIGHTS != "":
        scale += e * (scale_rows(ROWS) * BLOCKS)
    n = tl.minimum(n, INNER - 1)
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for step in range((WHOLE + BK - 1) // BK):
        rows = load_rows(x, offset, mask, step, HIDDEN, BK, WEIGHTS, BLOCK)
        gate = add_product(gate, rows, w, scale, n, step, ROWS, HIDDEN, BN, BK, WEIGHTS, BLOCK, NATIVE_FP8, INTERPRETED)
        if GATED:
            up = add_product(
                up, rows, w, scale, n + INNER, step, ROWS, HIDDEN, BN, BK, WEIGHTS, BLOCK, NATIVE_FP8, INTERPRETED
            )
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
    scale,  # [E, blocks, scale_rows(H)] or null
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
    NATIVE_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """rows times down: [BM, BN] float32."""
    BLOCKS: tl.constexpr = (INNER + BLOCK - 1) // BLOCK
    WHOLE: tl.constexpr = INNER if WEIGHTS == "" else BLOCKS * BLOCK
    w += e * (HIDDEN * WHOLE // (2 if WEIGHTS == "int4" else 1))
    if WEIGHTS != "":
        scale += e * (scale_rows(HIDDEN) * BLOCKS)
    n = tl.minimum(n, HIDDEN - 1)
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range((WHOLE + BK - 1) // BK):
        rows = load_rows(x, offset, mask, step, INNER, BK, WEIGHTS, BLOCK)
        acc = add_product(acc, rows, w, scale, n, step, HIDDEN, INNER, BN, BK, WEIGHTS, BLOCK, NATIVE_FP8, INTERPRETED)
    if HAS_BIASES:
        acc += tl.load(bias + e * HIDDEN + n).to(tl.float32)[None, :]
    return acc
