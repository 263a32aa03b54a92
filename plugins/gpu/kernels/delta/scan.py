"""A sequence's chunks one after the other: each program carries some columns of a head's state through all of them."""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.blocks import multiply
from moevlm.plugins.gpu.kernels.delta.convolve import keep_inputs
from moevlm.plugins.gpu.kernels.delta.recurrent import parts_of
from moevlm.plugins.gpu.kernels.delta.rows import load_head, load_state_row, sequence_of, state_block
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def delta_scan(
    x,  # [T, H.row]
    mixed,  # [T, H.channels]
    values,  # [T, H.value_heads, H.value_dim], see `chunks`
    keys,  # [T, H.value_heads, H.key_dim]
    scores,  # [T, H.value_heads, BT]
    decays,  # [T, H.value_heads] float32
    conv_state,  # [rows, H.kernel - 1, H.channels] float32, written
    delta_state,  # [rows, H.value_heads, H.key_dim, H.value_dim] float32, written
    query_start,  # [N + 1] int32
    state_row,  # [N] int32
    y,  # [T, H.value_heads * H.value_dim], written
    tokens,
    rows,
    BT: tl.constexpr,
    BV: tl.constexpr,
    H: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Programs: (sequence; value head; BV columns of its state). Sequences of one token are left out."""
    wait_for_previous(OVERLAPS)
    dtype: tl.constexpr = tl.float32 if INTERPRETED else mixed.dtype.element_ty
    n, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = sequence_of(query_start, n, tokens)
    if end - start < 2:
        return
    row = load_state_row(state_row, n, rows)
    pointer, inside = state_block(delta_state, row, head, block, end > start, BV, H)
    state = tl.load(pointer, mask=inside, other=0.0)
    i = tl.arange(0, BT)
    d = tl.arange(0, H.key_width)
    v = block * BV + tl.arange(0, BV)
    query_first = head // H.group * H.key_dim
    key_first = (H.key_heads + head // H.group) * H.key_dim
    for first in range(start, end, BT):
        token = first + i
        real = token < end
        place = token.to(tl.int64) * H.value_heads + head
        mask = real[:, None] & (v < H.value_dim)[None, :]
        own = tl.load(
            keys + place[:, None] * H.key_dim + d[None, :], mask=real[:, None] & (d < H.key_dim)[None, :], other=0.0
        ).to(dtype)
        query = load_head(mixed, token, real, query_first, H.key_dim, H.key_width, H).to(dtype)
        across = mixed + (token.to(tl.int64) * H.channels + key_first)[None, :] + d[:, None]
        key = tl.load(across, mask=real[None, :] & (d < H.key_dim)[:, None], other=0.0).to(dtype)
        score = tl.load(scores + place[:, None] * BT + i[None, :], mask=real[:, None], other=0.0).to(dtype)
        value = tl.load(values + place[:, None] * H.value_dim + v[None, :], mask=mask, other=0.0).to(tl.float32)
        sums = tl.load(decays + place, mask=real, other=0.0)
        last = tl.load(decays + (tl.minimum(first + BT, end) - 1).to(tl.int64) * H.value_heads + head)
        before = state.to(dtype)
        nothing = tl.zeros([BT, BV], tl.float32)
        change = value - multiply(own, before, nothing, INTERPRETED)
        result = multiply(query, before, nothing, INTERPRETED) * tl.exp(sums)[:, None]
        result = multiply(score, change.to(dtype), result, INTERPRETED)
        tl.store(y + place[:, None] * H.value_dim + v[None, :], result.to(y.dtype.element_ty), mask=mask)
        change = (change * tl.exp(last - sums)[:, None]).to(dtype)
        state = multiply(key, change, state * tl.exp(last), INTERPRETED)
    tl.store(pointer, state, mask=inside)
    PARTS: tl.constexpr = parts_of(H, BV)
    keep_inputs(x, conv_state, row, start, end, head * (PARTS // H.value_heads) + block, PARTS, H)
