"""Rows times an expert's weights, whatever their format, and what follows: the inside of every experts kernel.

Weights are read in steps of TILE.BK input columns. W says how they are stored; the layout of a group is stated in
`moevlm.export.formats.gpu_packing`. A step of int4 or fp4 is four parts, one for each 4 bits of a 16-bit unit.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.e4m3 import decode_fp8


@triton.jit
def load_part(x, offset, mask, step, PART: tl.constexpr, W: tl.constexpr, BK: tl.constexpr):
    if W.quarters:
        QUARTER: tl.constexpr = W.group // 4
        j = tl.arange(0, BK // 4)
        if W.group <= BK:
            column = step * BK + (j // QUARTER) * W.group + j % QUARTER + PART * QUARTER
        else:
            PARTS: tl.constexpr = W.group // BK
            column = (step // PARTS) * W.group + (step % PARTS) * (BK // 4) + j + PART * QUARTER
    else:
        column = step * BK + tl.arange(0, BK)
    pointer = x + offset[:, None] + column[None, :]
    if W.width % BK == 0 and W.stored_width == W.width:
        rows = tl.load(pointer, mask=mask[:, None], other=0.0)
    else:
        rows = tl.load(pointer, mask=mask[:, None] & (column[None, :] < W.width), other=0.0)
    return rows


@triton.jit
def load_rows(
    x,  # [.., W.width]
    offset,  # [BM]: where each row starts
    mask,  # [BM]: which rows are real; the others are zeros
    step,
    W: tl.constexpr,
    BK: tl.constexpr,
):
    """The columns of one step: [BM, BK], of quarters four times [BM, BK / 4]."""
    if W.quarters:
        return (
            load_part(x, offset, mask, step, 0, W, BK),
            load_part(x, offset, mask, step, 1, W, BK),
            load_part(x, offset, mask, step, 2, W, BK),
            load_part(x, offset, mask, step, 3, W, BK),
        )
    else:
        return load_part(x, offset, mask, step, 0, W, BK)


@triton.jit
def raised(code, dtype: tl.constexpr):
    """4-bit codes in 16 bits, each as the lowest bits of a number whose last place is worth 1.

    No conversion is needed, and differences are exact.
    """
    if dtype == tl.float16:
        value = (code | 0x6400).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16:
        value = (code | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        value = code.to(tl.float32)
    return value


@triton.constexpr_function
def raised_eight(dtype):
    """The code 8 so: the zero of groups that have none of their own."""
    return {tl.float16: 1032, tl.bfloat16: 136}.get(dtype, 8)


@triton.jit
def e2m1(units, part: tl.constexpr, dtype: tl.constexpr):
    """The numbers of the e2m1 codes that 16-bit units have in the 4 bits of a part.

    As float16, whose exponent has more bits, such a code is its number times 2 ** -14.
    """
    if part < 3:
        magnitude = units << (9 - 4 * part)
    else:
        magnitude = units >> 3
    bits = (magnitude & 0x0E00) | ((units << (12 - 4 * part)) & -32768)
    return (bits.to(tl.float16, bitcast=True) * 16384).to(dtype)


@triton.jit
def e4m3_of(words, part: tl.constexpr, NATIVE: tl.constexpr):
    """The number of each word's byte `part`, a code in e4m3, as `decode_fp8` has it.

    float16 holds its product with an e2m1 number, six binary digits at most: nothing is rounded.
    """
    return decode_fp8((words >> (8 * part)).to(tl.int8), tl.float16, NATIVE)


@triton.jit
def per_group(numbers, GROUPS: tl.constexpr):
    """numbers [BN, GROUPS] as what meets weights [BN, GROUPS, columns of a group]; of one group, [BN, columns]."""
    return numbers[:, :, None] if GROUPS > 1 else numbers


@triton.jit
def scaled(value, zero, factor, BN: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """value [BN, COLUMNS], in GROUPS equal parts, less its zero, times its factor: in value's dtype, rounded once.

    factor: [BN, GROUPS], in value's dtype or in float32. zero: of that shape, or None for 0.
    """
    whole = tl.reshape(value, (BN, GROUPS, COLUMNS // GROUPS)) if GROUPS > 1 else value
    if zero is not None:
        whole -= per_group(zero, GROUPS)
    whole = (whole.to(factor.dtype) * per_group(factor, GROUPS)).to(value.dtype)
    return tl.reshape(whole, (BN, COLUMNS)) if GROUPS > 1 else whole


@triton.jit
def groups_of(step, W: tl.constexpr, BK: tl.constexpr):
    """The groups of one step, at least one."""
    if W.group < BK:
        group = step * (BK // W.group) + tl.arange(0, BK // W.group)
    else:
        group = step * BK // W.group + tl.arange(0, 1)
    return group


@triton.jit
def load_zero(zero, n, step, W: tl.constexpr, BK: tl.constexpr):
    """The zeros of one step, as codes in 16 bits: [BN, groups of the step]."""
    group = groups_of(step, W, BK)[None, :]
    word = tl.load(zero + group * (W.scale_rows // 8) + (n // 8)[:, None], mask=group < W.groups, other=0)
    return ((word >> (n % 8 * 4)[:, None]) & 15).to(tl.int16)


@triton.jit
def load_factor(scale, n, step, W: tl.constexpr, BK: tl.constexpr):
    """The scales of one step: [BN, groups of the step]; int32 words of four scales where rows have scales, too."""
    group = groups_of(step, W, BK)
    mask = group[None, :] < W.groups
    if scale.dtype.element_ty.primitive_bitwidth == 32:
        factor = tl.load(scale + group[None, :] * W.scale_rows + n[:, None], mask=mask, other=0.0)
    else:
        # Nothing below 4 bytes is copied asynchronously, so a row's scale is read with its neighbour's.
        words = scale.to(tl.pointer_type(tl.int32)) + group[None, :] * (W.scale_rows // 2)
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
    w,  # one expert's weights [W.rows, stored width]
    scale,  # its scales [W.groups, W.scale_rows]
    zero,  # its zeros [W.groups, words of W.scale_rows]
    n,  # [BN]: which of its rows
    step,
    W: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """acc + the step's rows times weights."""
    GROUPS: tl.constexpr = TILE.BK // W.group if W.group < TILE.BK else 1
    if W.format == "":
        acc = multiply(rows, load_codes(w, n, step, W.width, TILE.BK), acc, INTERPRETED)
    else:
        given: tl.constexpr = rows[0].dtype if W.quarters else rows.dtype
        dtype: tl.constexpr = tl.float32 if INTERPRETED and given == tl.bfloat16 else given
        factor = load_factor(scale, n, step, W, TILE.BK)
        if factor.dtype != dtype and not W.row_scales:  # its own precision, or the interpreter's
            factor = factor.to(tl.float32)
        if W.quarters:
            units = load_codes(w.to(tl.pointer_type(tl.int16)), n, step, W.stored_width // 4, TILE.BK // 4)
            less = raised(load_zero(zero, n, step, W, TILE.BK), dtype) if W.zeros else None
            for part in tl.static_range(4):
                if W.row_scales:
                    numbers, of_part = e2m1(units, part, tl.float16), e4m3_of(factor, part, W.native_fp8)
                    value = scaled(numbers, None, of_part, TILE.BN, GROUPS, TILE.BK // 4).to(dtype)
                elif W.format == "fp4":
                    value = scaled(e2m1(units, part, dtype), None, factor, TILE.BN, GROUPS, TILE.BK // 4)
                else:
                    value = raised((units >> (4 * part)) & 15, dtype)
                    if not W.zeros:
                        value -= raised_eight(dtype)
                    value = scaled(value, less, factor, TILE.BN, GROUPS, TILE.BK // 4)
                acc = multiply(rows[part], value, acc, INTERPRETED)
        else:
            code = load_codes(w, n, step, W.stored_width, TILE.BK)
            if W.format == "fp8":
                value = decode_fp8(code, dtype, W.native_fp8)
                if not W.native_fp8:
                    factor *= 256
            else:
                value = code.to(dtype)
            acc = multiply(rows, scaled(value, None, factor, TILE.BN, GROUPS, TILE.BK), acc, INTERPRETED)
    return acc


@triton.jit
def expert_weights(w, e, W: tl.constexpr):
    """Where the weights of expert e begin; e: int64."""
    return w + e * (W.rows * W.stored_width // (2 if W.quarters else 1))


@triton.jit
def expert_scales(scale, e, W: tl.constexpr):
    """Where the scales of expert e begin, if weights have any."""
    if W.format != "":
        scale += e * (W.groups * W.scale_rows)
    return scale


@triton.jit
def expert_zeros(zero, e, W: tl.constexpr):
    """Where the zeros of expert e begin, if weights have any."""
    if W.zeros:
        zero += e * (W.groups * (W.scale_rows // 8))
    return zero


@triton.jit
def load_row_scales(row_scale, place, W: tl.constexpr):
    """Scales of rows, for products with scales of groups as `e4m3_of` has them."""
    factor = tl.load(row_scale + place)
    return factor if W.native_fp8 else factor * 256


@triton.jit
def by_row_scales(acc, row_scale, e, n, W: tl.constexpr):
    """acc [BM, BN], products with rows n of expert e, times the scales of these rows, if weights have any."""
    if W.row_scales:
        acc *= load_row_scales(row_scale, e * W.rows + n, W)[None, :]
    return acc


@triton.jit
def activate(gate, up, SPEC: tl.constexpr):
    """The middle of an expert, in float32."""
    if SPEC.activation == "swiglu_clamped":
        gate = tl.minimum(gate, SPEC.limit)
        up = tl.minimum(tl.maximum(up, -SPEC.limit), SPEC.limit)
        return gate * tl.sigmoid(SPEC.alpha * gate) * (up + 1)
    if SPEC.activation == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) = sigmoid(2 * z), z = sqrt(2 / pi) * (..)
        out = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        out = gate * tl.sigmoid(gate)
    if SPEC.gated:
        out *= up
    return out


@triton.constexpr_function
def inner_of(W, SPEC):
    """Outputs of gate_up after its activation."""
    return W.rows // 2 if SPEC.gated else W.rows


@triton.jit
def finish_gate_up(gate, up, factor, bias, e, n, SPEC: tl.constexpr, W: tl.constexpr):
    """What follows the products gate and up [BM, BN]. factor: see `gate_up_tile`."""
    INNER: tl.constexpr = inner_of(W, SPEC)
    if SPEC.weight_on == "input":  # the products are linear, so here instead of in the loop
        gate *= factor[:, None]
        up *= factor[:, None]
    if W.has_bias:
        gate += tl.load(bias + e * W.rows + n).to(tl.float32)[None, :]
        if SPEC.gated:
            up += tl.load(bias + e * W.rows + INNER + n).to(tl.float32)[None, :]
    return activate(gate, up, SPEC)


@triton.jit
def gate_up_tile(
    x,  # [T, H]
    offset,  # [BM] int64: where each row starts in x
    mask,  # [BM]: which rows are real
    factor,  # [BM] float32: the rows' routing weights, if they scale the input
    w,  # [E, R, H], R = 2I, gate rows first, or I
    scale,  # [E, groups, scale rows] or null
    zero,  # [E, groups, words of scale rows] or null
    row_scale,  # [E, R] float32 or null
    bias,  # [E, R] or null
    e,  # int64: the expert
    n,  # [BN]: which of its I outputs; those beyond are computed as the last
    SPEC: tl.constexpr,  # ExpertsSpec
    W: tl.constexpr,  # Projection
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """activation(rows times gate_up): [BM, BN] float32."""
    INNER: tl.constexpr = inner_of(W, SPEC)
    STEPS: tl.constexpr = (W.stored_width + TILE.BK - 1) // TILE.BK
    w = expert_weights(w, e, W)
    scale, zero = expert_scales(scale, e, W), expert_zeros(zero, e, W)
    n = tl.minimum(n, INNER - 1)
    gate = tl.zeros([TILE.BM, TILE.BN], tl.float32)
    up = tl.zeros([TILE.BM, TILE.BN], tl.float32)
    for step in range(STEPS):
        rows = load_rows(x, offset, mask, step, W, TILE.BK)
        gate = add_product(gate, rows, w, scale, zero, n, step, W, TILE, INTERPRETED)
        if SPEC.gated:
            up = add_product(up, rows, w, scale, zero, n + INNER, step, W, TILE, INTERPRETED)
    gate = by_row_scales(gate, row_scale, e, n, W)
    if SPEC.gated:
        up = by_row_scales(up, row_scale, e, n + INNER, W)
    return finish_gate_up(gate, up, factor, bias, e, n, SPEC, W)


@triton.jit
def down_tile(
    x,  # [rows, I]
    offset,
    mask,
    w,  # [E, H, I]
    scale,  # [E, groups, scale rows] or null
    zero,  # [E, groups, words of scale rows] or null
    row_scale,  # [E, H] float32 or null
    bias,  # [E, H] or null
    e,
    n,  # [BN]: which of its H outputs
    W: tl.constexpr,  # Projection
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """rows times down: [BM, BN] float32."""
    STEPS: tl.constexpr = (W.stored_width + TILE.BK - 1) // TILE.BK
    w = expert_weights(w, e, W)
    scale, zero = expert_scales(scale, e, W), expert_zeros(zero, e, W)
    n = tl.minimum(n, W.rows - 1)
    acc = tl.zeros([TILE.BM, TILE.BN], tl.float32)
    for step in range(STEPS):
        rows = load_rows(x, offset, mask, step, W, TILE.BK)
        acc = add_product(acc, rows, w, scale, zero, n, step, W, TILE, INTERPRETED)
    acc = by_row_scales(acc, row_scale, e, n, W)
    if W.has_bias:
        acc += tl.load(bias + e * W.rows + n).to(tl.float32)[None, :]
    return acc


@triton.jit
def store_tile(out, row, n, value, mask, WIDTH: tl.constexpr):
    """value [BM, BN] into columns n of rows of out [.., WIDTH], in its dtype. row, mask: [BM], where and which."""
    pointer = out + row.to(tl.int64)[:, None] * WIDTH + n[None, :]
    tl.store(pointer, value.to(out.dtype.element_ty), mask=mask[:, None] & (n < WIDTH)[None, :])
