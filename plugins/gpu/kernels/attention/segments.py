"""Packed rows of several segments (sequences, images): which of them a row, or a tile of rows, belongs to.

No index depends on what the boundaries hold.
"""

import triton
import triton.language as tl


@triton.jit
def clamped(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def segment_of(start, place, segments, BM: tl.constexpr):
    """The last segment that starts at or before `place`, a number or a block of them, by bisection.

    start: [segments + 1] int32, segment i has the rows start[i] to start[i + 1]. place: a row, with BM 0, or else a
    tile of BM rows, of which start[i] // BM + i is the first one of segment i.
    """
    found = place * 0
    step = 1
    while step < segments:
        step *= 2
    while step > 0:
        probe = tl.minimum(found + step, segments - 1)
        begin = tl.load(start + probe)
        if BM > 0:
            begin = begin // BM + probe
        found = tl.where(begin <= place, probe, found)
        step //= 2
    return found


@triton.jit
def rows_of_tile(start, tile, segments, rows, BM: tl.constexpr):
    """A tile's segment, where that starts and stops, and the tile's first row, which is the stop if it has none.

    rows // BM + segments tiles are enough for all, see `segment_of`. All three rows are of 0 to `rows`.
    """
    segment = segment_of(start, tile, segments, BM)
    begin = clamped(tl.load(start + segment), 0, rows)
    end = clamped(tl.load(start + segment + 1), begin, rows)
    first = begin + (tile - begin // BM - segment) * BM
    first = tl.where((first < begin) | (first > end), end, first)
    return segment, begin, end, first
