"""Which sequence a token, or a tile of tokens, belongs to, and its pages. No index from data is used unclamped."""

import triton
import triton.language as tl


@triton.jit
def sequence_of(query_start, place, sequences, TILE: tl.constexpr):
    """The last sequence that starts at or before `place`, a number or a block of them.

    TILE: 0 where `place` is a token, or how many tokens a tile has: sequence n then starts with tile
    query_start[n] // TILE + n, so that no tile has tokens of two sequences.
    """
    found = place * 0
    step = 1
    while step < sequences:
        step *= 2
    while step > 0:
        probe = tl.minimum(found + step, sequences - 1)
        start = tl.load(query_start + probe)
        if TILE > 0:
            start = start // TILE + probe
        found = tl.where(start <= place, probe, found)
        step //= 2
    return found


@triton.jit
def clamped(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def page_of(page_table, sequence, position, columns, pages, PAGE: tl.constexpr):
    """The page that holds a position, or several, of a sequence: int64."""
    column = clamped(position // PAGE, 0, columns - 1)
    page = tl.load(page_table + sequence.to(tl.int64) * columns + column)
    return clamped(page, 0, pages - 1).to(tl.int64)
