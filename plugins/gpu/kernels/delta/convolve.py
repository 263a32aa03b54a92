"""The convolution in front of the delta rule, and the state that it keeps."""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.segments import clamped, segment_of
from moevlm.plugins.gpu.kernels.delta.rows import load_state_row
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def convolve(
    x,  # [T, H.row]
    conv_weight,  # [H.channels, H.kernel] float32
    conv_state,  # [rows, H.kernel - 1, H.channels] float32
    query_start,  # [N + 1] int32
    state_row,  # [N] int32
    mixed,  # [T, H.channels], written
    tokens,
    sequences,
    rows,
    BM: tl.constexpr,
    H: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Programs: (BM tokens; a head of queries, of keys or of values).

    Queries and keys become of unit length, queries times H.scale. Nothing is kept: others still read conv_state.
    """
    wait_for_previous(OVERLAPS)
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    real = place < tokens
    token = tl.minimum(place, tokens - 1)
    n = segment_of(query_start, token, sequences, 0)
    behind = clamped(token - tl.load(query_start + n), 0, token)  # tokens of its sequence before it, in this step
    row = load_state_row(state_row, n, rows)
    head = tl.program_id(1)
    is_value = head >= 2 * H.key_heads
    values = 2 * H.key_heads * H.key_dim
    first = tl.where(is_value, values + (head - 2 * H.key_heads) * H.value_dim, head * H.key_dim)
    d = tl.arange(0, H.head_width)
    inside = d < tl.where(is_value, H.value_dim, H.key_dim)
    channel = first + d
    total = tl.zeros([BM, H.head_width], tl.float32)
    for tap in tl.static_range(H.kernel):
        back = H.kernel - 1 - tap
        new = real & (behind >= back)
        value = tl.load(
            x + (token - back).to(tl.int64)[:, None] * H.row + channel[None, :],
            mask=new[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        if back > 0:
            old = real & (behind < back) & (row > 0)
            kept = (row * (H.kernel - 1) + behind + tap)[:, None] * H.channels + channel[None, :]
            value += tl.load(conv_state + kept, mask=old[:, None] & inside[None, :], other=0.0)
        total += value * tl.load(conv_weight + channel * H.kernel + tap, mask=inside, other=0.0)[None, :]
    total *= tl.sigmoid(total)
    if not is_value:
        length = tl.rsqrt(tl.sum(total * total, 1) + H.epsilon)
        total *= (length * tl.where(head < H.key_heads, H.scale, 1.0))[:, None]
    out = mixed + token.to(tl.int64)[:, None] * H.channels + channel[None, :]
    tl.store(out, total.to(mixed.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit
def keep_inputs(x, conv_state, row, start, end, part, PARTS: tl.constexpr, H: tl.constexpr):
    """Keep a sequence's last inputs in its row of conv_state: one of PARTS equal parts of the channels.

    Another launch has read the row before.
    """
    SHARE: tl.constexpr = (H.channels + PARTS - 1) // PARTS
    place = tl.arange(0, triton.next_power_of_2(SHARE))
    channel = part * SHARE + place
    tap = tl.arange(0, triton.next_power_of_2(H.kernel - 1))
    channels = tl.where(row > 0, H.channels, 0)  # row 0 is nobody's
    mask = (tap < H.kernel - 1)[:, None] & ((place < SHARE) & (channel < channels))[None, :]
    source = tap + (end - start)  # in the row with the step's inputs behind it
    old, fresh = (source < H.kernel - 1)[:, None], (source >= H.kernel - 1)[:, None]
    new = tl.maximum(start + source - (H.kernel - 1), 0).to(tl.int64)
    states = conv_state + row * ((H.kernel - 1) * H.channels) + channel[None, :]
    value = tl.load(states + source[:, None] * H.channels, mask=mask & old, other=0.0)
    value += tl.load(x + new[:, None] * H.row + channel[None, :], mask=mask & fresh, other=0.0).to(tl.float32)
    tl.debug_barrier()  # a row moves up: all of it is read before any is written
    tl.store(states + tap[:, None] * H.channels, value, mask=mask)
