"""Which expert a row goes to, if any.

The index is data: whatever it holds, no kernel may read or write outside its arguments. TensorRT's builder runs plugins
on made-up inputs.
"""

import triton
import triton.language as tl


@triton.jit
def is_expert(index):
    """-1 is none: such a row is not computed, and adds nothing."""
    return index >= 0


@triton.jit
def nearest_expert(index, EXPERTS: tl.constexpr):
    return tl.minimum(tl.maximum(index, 0), EXPERTS - 1)
