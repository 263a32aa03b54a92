"""Launches that overlap: programmatic dependent launch, from SM 9.0 on.

A launch begins when every program of the one before has begun, instead of when all have ended, so what it does before
it waits hides behind the other's end.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE = tl.constexpr(128)  # bytes that one prefetch asks for


@triton.jit
def wait_for_previous(OVERLAPS: tl.constexpr):
    """Let the next launch begin, and wait until the one before has ended and all that it wrote is seen.

    What earlier launches write may be read after it alone, and nothing may be written before it. OVERLAPS: the GPU has
    this; the launcher of Triton's interpreter makes it false.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch_rows(w, n, ROW_BYTES: tl.constexpr):
    """Ask for rows n of w, a pointer to rows of ROW_BYTES, to be brought into the L2 cache."""
    LINES: tl.constexpr = (ROW_BYTES + LINE - 1) // LINE
    line = tl.minimum(tl.arange(0, triton.next_power_of_2(LINES)), LINES - 1)
    address = w.to(tl.pointer_type(tl.int8)) + n[:, None] * ROW_BYTES + line[None, :] * LINE
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )
