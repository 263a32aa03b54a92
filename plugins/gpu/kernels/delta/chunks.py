"""The delta rule in chunks of tokens, all at once: what a chunk does to any state that it is given.

Within a chunk that begins with state S, token i changes its state by k_i u_i, with
u_i = beta_i (v_i - exp(G_i) k_i S - sum over j < i of exp(G_i - G_j) (k_i k_j) u_j), G the running sum of log decays.
That is (1 + A) u = beta v - beta exp(G) k S, so with the inverse of 1 + A, whose A is strictly lower triangular,
u = U - W S: U and W, the WY form of Yang et al. 2024 (Parallelizing Linear Transformers with the Delta Rule), with
decays of Yang et al. 2025, need no state.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.blocks import multiply
from moevlm.plugins.gpu.kernels.attention.segments import rows_of_tile
from moevlm.plugins.gpu.kernels.delta.rows import load_gates, load_head
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def unit_inverse(a, BT: tl.constexpr):
    """The inverse of 1 + a, for strictly lower triangular a [BT, BT] float32; BT is 16 or 32.

    Blocks of 16 on the diagonal by forward substitution, side by side. From these, d, and the block b between them
    comes what is left: -d b d. Powers of a would overflow where keys are alike.
    """
    BLOCKS: tl.constexpr = BT // 16
    i, block = tl.arange(0, 16), tl.arange(0, BLOCKS)
    same = (block[:, None] == block[None, :])[:, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(a, [BLOCKS, 16, BLOCKS, 16]), 0.0), 2)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)[None, :, :] + tl.zeros([BLOCKS, 16, 16], tl.float32)
    for step in range(1, 16):
        chosen = (i == step)[None, :, None]
        factor = tl.sum(tl.where(chosen, diagonal, 0.0), 1)  # row `step` of each block: [BLOCKS, 16]
        row = tl.sum(factor[:, :, None] * inverse, 1)
        inverse = tl.where(chosen, inverse - row[:, None, :], inverse)
    inverse = tl.reshape(tl.where(same, inverse[:, :, None, :], 0.0), [BT, BT])
    if BLOCKS == 2:
        half = tl.arange(0, BT) // 16
        between = tl.where(half[:, None] > half[None, :], a, 0.0)
        left = tl.dot(inverse, between, input_precision="ieee")
        inverse -= tl.dot(left, inverse, input_precision="ieee")
    return inverse


@triton.jit
def delta_chunks(
    x,  # [T, H.row]
    mixed,  # [T, H.channels]
    rate,  # [H.value_heads] float32
    dt_bias,
    query_start,  # [N + 1] int32
    values,  # [T, H.value_heads, H.value_dim], written: U
    keys,  # [T, H.value_heads, H.key_dim], written: W
    scores,  # [T, H.value_heads, BT], written: exp(G_i - G_j) q_i k_j, of j up to i in its chunk
    decays,  # [T, H.value_heads] float32, written: G
    tokens,
    sequences,
    BT: tl.constexpr,
    H: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Programs: (chunk of BT tokens of a sequence; value head). Sequences of one token are left out."""
    wait_for_previous(OVERLAPS)
    dtype: tl.constexpr = tl.float32 if INTERPRETED else mixed.dtype.element_ty
    _, start, end, first = rows_of_tile(query_start, tl.program_id(0), sequences, tokens, BT)
    if (first >= end) | (end - start == 1):
        return
    head = tl.program_id(1)
    key_head = head // H.group
    i = tl.arange(0, BT)
    token = first + i
    real = token < end
    decay, beta = load_gates(x, rate, dt_bias, token, real, head, H)
    sums = tl.cumsum(decay, 0)
    place = token.to(tl.int64) * H.value_heads + head
    tl.store(decays + place, sums, mask=real)
    lower = i[:, None] >= i[None, :]
    left = tl.exp(tl.where(lower, sums[:, None] - sums[None, :], float("-inf")))
    key = load_head(mixed, token, real, (H.key_heads + key_head) * H.key_dim, H.key_dim, H.key_width, H).to(dtype)
    query = load_head(mixed, token, real, key_head * H.key_dim, H.key_dim, H.key_width, H).to(dtype)
    nothing = tl.zeros([BT, BT], tl.float32)
    score = left * multiply(query, tl.trans(key), nothing, INTERPRETED)
    tl.store(scores + place[:, None] * BT + i[None, :], score.to(scores.dtype.element_ty), mask=real[:, None])
    likeness = left * multiply(key, tl.trans(key), nothing, INTERPRETED) * beta[:, None]
    likeness = tl.where(i[:, None] > i[None, :], likeness, 0.0)
    inverse = unit_inverse(likeness, BT).to(dtype)
    d = tl.arange(0, H.key_width)
    key = (key.to(tl.float32) * (beta * tl.exp(sums))[:, None]).to(dtype)
    own = multiply(inverse, key, tl.zeros([BT, H.key_width], tl.float32), INTERPRETED)
    out = keys + place[:, None] * H.key_dim + d[None, :]
    tl.store(out, own.to(keys.dtype.element_ty), mask=real[:, None] & (d < H.key_dim)[None, :])
    d = tl.arange(0, H.value_width)
    channel = 2 * H.key_heads * H.key_dim + head * H.value_dim
    value = load_head(mixed, token, real, channel, H.value_dim, H.value_width, H)
    value = (value.to(tl.float32) * beta[:, None]).to(dtype)
    own = multiply(inverse, value, tl.zeros([BT, H.value_width], tl.float32), INTERPRETED)
    out = values + place[:, None] * H.value_dim + d[None, :]
    tl.store(out, own.to(values.dtype.element_ty), mask=real[:, None] & (d < H.value_dim)[None, :])
