"""Packed rows of several segments (sequences, images): which of them a tile of rows takes."""

import triton
import triton.language as tl


@triton.jit
def rows_of_tile(
    start,  # [segments + 1] int32: segment i has the rows start[i] to start[i + 1]
    tile,
    segments,
    rows,
    BM: tl.constexpr,
):
    """Where a tile's segment starts and stops, and the tile's first row, which is the stop if it has none.

    Tile start[i] // BM + i is the first one of segment i, so rows // BM + segments tiles are enough, and the number of
    a tile's segment is found by bisection. All three rows are of 0 to `rows`, whatever `start` holds.
    """
    low = 0
    high = segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        before = tl.minimum(tl.maximum(tl.load(start + middle), 0), rows) // BM + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    begin = tl.minimum(tl.maximum(tl.load(start + low), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(start + low + 1, mask=low < segments, other=0), begin), rows)
    first = begin + (tile - begin // BM - low) * BM
    first = tl.where((first < begin) | (first > end), end, first)
    return begin, end, first
