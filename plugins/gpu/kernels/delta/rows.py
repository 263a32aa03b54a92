"""Tokens' rows between kernels, and what a token forgets and takes up.

A row of the op's input holds a token's queries, keys and values before the convolution, then `a` and `b` of each value
head. A row of `mixed` holds the convolved queries, keys and values.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.segments import clamped


@triton.jit
def sequence_of(query_start, n, tokens):
    """The first token of sequence n, and the one behind its last, of 0 to `tokens`."""
    start = clamped(tl.load(query_start + n), 0, tokens)
    return start, clamped(tl.load(query_start + n + 1), start, tokens)


@triton.jit
def load_state_row(state_row, n, rows):
    """The row of sequence n, or of several, in both states: int64. Row 0 is nobody's: neither read nor written."""
    return clamped(tl.load(state_row + n), 0, rows - 1).to(tl.int64)


@triton.jit
def load_gates(x, rate, dt_bias, token, mask, head, H: tl.constexpr):
    """One value head of tokens: the logarithm of what is left of the state, 0 or less, and beta, both float32.

    Zeros where mask is false.
    """
    offset = token.to(tl.int64) * H.row + H.channels + head
    a = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) + tl.load(dt_bias + head)
    b = tl.load(x + offset + H.value_heads, mask=mask, other=0.0).to(tl.float32)
    softplus = tl.maximum(a, 0.0) + tl.log(1 + tl.exp(-tl.abs(a)))
    return tl.where(mask, -tl.load(rate + head) * softplus, 0.0), tl.where(mask, tl.sigmoid(b), 0.0)


@triton.jit
def load_head(mixed, token, mask, first, DIM: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr):
    """A head of DIM channels from `first` on, zeros beyond: [tokens, WIDTH] as stored."""
    d = tl.arange(0, WIDTH)
    pointer = mixed + (token.to(tl.int64) * H.channels + first)[:, None] + d[None, :]
    return tl.load(pointer, mask=mask[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def state_block(delta_state, row, head, block, taken, BV: tl.constexpr, H: tl.constexpr):
    """BV columns of one head's state: pointers [H.key_width, BV], and which are real.

    None are if it is not taken, and in row 0, which is nobody's.
    """
    k = tl.arange(0, H.key_width)
    v = block * BV + tl.arange(0, BV)
    offset = (row * H.value_heads + head) * (H.key_dim * H.value_dim)
    pointer = delta_state + offset + k[:, None] * H.value_dim + v[None, :]
    return pointer, (k < H.key_dim)[:, None] & (v < tl.where(taken & (row > 0), H.value_dim, 0))[None, :]
