"""The delta rule token by token: a program has some columns of a head's state, which it reads and writes once."""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.delta.convolve import keep_inputs
from moevlm.plugins.gpu.kernels.delta.rows import load_gates, load_state_row, sequence_of, state_block
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.constexpr_function
def parts_of(H, BV):
    """Programs of a sequence."""
    return H.value_heads * -(-H.value_dim // BV)


@triton.jit
def delta_recurrent(
    x,  # [T, H.row]
    mixed,  # [T, H.channels]
    rate,  # [H.value_heads] float32
    dt_bias,
    conv_state,  # [rows, H.kernel - 1, H.channels] float32, written
    delta_state,  # [rows, H.value_heads, H.key_dim, H.value_dim] float32, written
    query_start,  # [N + 1] int32
    state_row,  # [N] int32
    y,  # [T, H.value_heads * H.value_dim], written
    tokens,
    rows,
    longest,
    BV: tl.constexpr,
    H: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Programs: (sequence; value head; BV columns of its state). Sequences of more than `longest` tokens are left out.

    With S for what is left of the state, q (S + k u) = q S + (q k) u: both products are of S, and neither waits.
    """
    n, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = sequence_of(query_start, n, tokens)
    row = load_state_row(state_row, n, rows)
    taken = (end > start) & (end - start <= longest)
    pointer, inside = state_block(delta_state, row, head, block, taken, BV, H)
    state = tl.load(pointer, mask=inside, other=0.0)  # no launch since the last of another op has written it
    wait_for_previous(OVERLAPS)
    if not taken:
        return
    d = tl.arange(0, H.key_width)
    v = block * BV + tl.arange(0, BV)
    key_head = head // H.group
    for i in range(end - start):
        token = start + i
        decay, beta = load_gates(x, rate, dt_bias, token, token >= 0, head, H)
        channels = mixed + token.to(tl.int64) * H.channels
        query = tl.load(channels + key_head * H.key_dim + d, mask=d < H.key_dim, other=0.0).to(tl.float32)
        keys = channels + (H.key_heads + key_head) * H.key_dim
        key = tl.load(keys + d, mask=d < H.key_dim, other=0.0).to(tl.float32)
        values = channels + 2 * H.key_heads * H.key_dim + head * H.value_dim
        value = tl.load(values + v, mask=v < H.value_dim, other=0.0).to(tl.float32)
        state *= tl.exp(decay)
        change = beta * (value - tl.sum(key[:, None] * state, 0))
        result = tl.sum(query[:, None] * state, 0) + tl.sum(query * key, 0) * change
        state += key[:, None] * change[None, :]
        out = y + (token.to(tl.int64) * H.value_heads + head) * H.value_dim
        tl.store(out + v, result.to(y.dtype.element_ty), mask=v < H.value_dim)
    tl.store(pointer, state, mask=inside)
    PARTS: tl.constexpr = parts_of(H, BV)
    keep_inputs(x, conv_state, row, start, end, head * (PARTS // H.value_heads) + block, PARTS, H)
