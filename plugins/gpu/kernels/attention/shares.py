"""What programs leave behind that walked a share of a token's keys each, for `merge` to add up."""

import triton
import triton.language as tl


@triton.jit
def store_state(states, state, places, shares, top, total, mask, H: tl.constexpr):
    """A share's top and total of each row. state: [BM], where they are in [places, shares, H.heads]."""
    tl.store(states + state, top, mask=mask)
    tl.store(states + places * shares * H.heads + state, total, mask=mask)


@triton.jit
def store_sums(sums, state, acc, mask, H: tl.constexpr):
    """A share's sums of values [BM, H.value_width]; they are read of rows alone whose total is above 0."""
    d = tl.arange(0, H.value_width)
    pointer = sums + state.to(tl.int64)[:, None] * H.value_dim + d[None, :]
    tl.store(pointer, acc, mask=mask[:, None] & (d < H.value_dim)[None, :])
