"""Where what a query sees of its sequence starts."""

import triton
import triton.language as tl


@triton.jit
def first_seen(position, H: tl.constexpr):
    """The first position that queries at `position`, a number or a block of them, see."""
    first = position * 0
    if H.window > 0:
        first = tl.maximum(position + 1 - H.window, 0)
    if H.chunk > 0:
        first = tl.maximum(position - position % H.chunk, first)
    return first
