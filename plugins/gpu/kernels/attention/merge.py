"""The shares of a token's keys become its result."""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.segments import clamped
from moevlm.plugins.gpu.kernels.attention.softmax import LOWEST
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def merge(
    sums,  # [places, shares, H.heads, H.value_dim] float32
    states,  # [2, places, shares, H.heads] float32: tops and totals
    query_start,  # [N + 1] int32
    y,  # [T, H.heads * H.value_dim], written
    tokens,
    shares,
    BY_SEQUENCE: tl.constexpr,
    SHARES: tl.constexpr,
    H: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A program is a query head of one token. SHARES: a power of two, `shares` or more."""
    wait_for_previous(OVERLAPS)
    place, head = tl.program_id(0), tl.program_id(1)
    token = place
    if BY_SEQUENCE:
        token = tl.load(query_start + place)
        if tl.load(query_start + place + 1) - token != 1:
            return
        token = clamped(token, 0, tokens - 1)
    share = tl.arange(0, SHARES)
    state = (place * shares + share) * H.heads + head
    top = tl.load(states + state, mask=share < shares, other=LOWEST)
    total = tl.load(states + tl.num_programs(0) * shares * H.heads + state, mask=share < shares, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    d = tl.arange(0, H.value_width)
    mask = (total > 0)[:, None] & (d < H.value_dim)[None, :]  # the others have no sums
    part = tl.load(sums + state.to(tl.int64)[:, None] * H.value_dim + d[None, :], mask=mask, other=0.0)
    result = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    offset = (token.to(tl.int64) * H.heads + head) * H.value_dim
    tl.store(y + offset + d, result.to(y.dtype.element_ty), mask=d < H.value_dim)
