"""One head's block of one page: a row for each token, of values, or of codes, and then a float32 scale for each.

Scales stand together so that those of consecutive tokens come 16 bytes at a time.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.codes import decoded_scale
from moevlm.plugins.gpu.kernels.attention.segments import clamped


@triton.jit
def page_of(page_table, sequence, position, columns, pages, H: tl.constexpr):
    """The page that holds a position, or several, of a sequence, whatever the table holds: int64."""
    column = clamped(position // H.page, 0, columns - 1)
    page = tl.load(page_table + sequence.to(tl.int64) * columns + column)
    return clamped(page, 0, pages - 1).to(tl.int64)


@triton.jit
def scales_of(block, DIM: tl.constexpr, H: tl.constexpr):
    return (block + H.page * DIM).to(tl.pointer_type(tl.float32))


@triton.jit
def load_rows(
    block,  # where the block starts
    row,  # [BN] int32: which rows
    mask,  # [BN]: those that are real; the others are zeros
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
):
    """Values or codes of WIDTH dimensions from FIRST on, zeros beyond DIM: [BN, WIDTH] as stored."""
    d = FIRST + tl.arange(0, WIDTH)
    pointer = block + (row[:, None] * DIM + d[None, :])
    if FIRST + WIDTH > DIM:
        value = tl.load(pointer, mask=mask[:, None] & (d < DIM)[None, :], other=0)
    else:
        value = tl.load(pointer, mask=mask[:, None], other=0)
    return value


@triton.jit
def load_scales(block, row, mask, DIM: tl.constexpr, H: tl.constexpr):
    """Factors of decoded rows: [BN] float32."""
    return decoded_scale(tl.load(scales_of(block, DIM, H) + row, mask=mask, other=0.0), H)
