"""Which expert a row goes to. The index is data: whatever it holds, no kernel may read or write outside its arguments.

TensorRT's builder runs plugins on made-up inputs.
"""

import triton
import triton.language as tl


@triton.jit
def nearest_expert(index, EXPERTS: tl.constexpr):
    return tl.minimum(tl.maximum(index, 0), EXPERTS - 1)
