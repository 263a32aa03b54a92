"""Sorting routed rows by expert, for many tokens. Row r = token * k + slot of `index` [T, k]; rows of no expert, -1,
are not among them.

`count_rows`, `start_rows` and `place_rows` follow one another; for few rows, `sort_rows` does it all in one launch.
The order of rows inside an expert is left to chance: each row's numbers depend on that row alone.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.moe.indices import is_expert, nearest_expert
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def count_rows(
    index,  # [T, k] int32
    counts,  # [2, E] int32, zeroed: how many rows go to each expert, and how many of them have been placed
    tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous(OVERLAPS)
    row = tl.program_id(0) * STEP + tl.arange(0, STEP)
    chosen = tl.load(index + row, mask=row < tokens * TOP_K, other=-1)
    expert, mask = nearest_expert(chosen, EXPERTS), is_expert(chosen)
    tl.atomic_add(counts + expert, 1, mask=mask)


@triton.jit
def start_rows(
    counts,  # [2, E] int32
    starts,  # [2, E + 1] int32, written: the first sorted row of each expert, and its first block; then their ends
    block_rows,  # rows of a block; an expert's last block may have fewer
    EXPERTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous(OVERLAPS)
    expert = tl.arange(0, triton.next_power_of_2(EXPERTS))
    count = tl.load(counts + expert, mask=expert < EXPERTS, other=0)
    blocks = (count + block_rows - 1) // block_rows
    tl.store(starts + expert + 1, tl.cumsum(count, 0), mask=expert < EXPERTS)
    tl.store(starts + EXPERTS + 2 + expert, tl.cumsum(blocks, 0), mask=expert < EXPERTS)
    tl.store(starts, 0)
    tl.store(starts + EXPERTS + 1, 0)


@triton.jit
def place_rows(
    index,  # [T, k] int32
    starts,  # [2, E + 1] int32
    counts,  # [2, E] int32
    rows,  # [T * k] int32, written: rows by expert
    blocks,  # [number of blocks, 2] int32, written: a block's expert and its first sorted row
    tokens,
    block_rows,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous(OVERLAPS)
    row = tl.program_id(0) * STEP + tl.arange(0, STEP)
    chosen = tl.load(index + row, mask=row < tokens * TOP_K, other=-1)
    expert, mask = nearest_expert(chosen, EXPERTS), is_expert(chosen)
    place = tl.atomic_add(counts + EXPERTS + expert, 1, mask=mask)
    position = tl.load(starts + expert, mask=mask, other=0) + place
    tl.store(rows + position, row, mask=mask)
    opens = mask & (place % block_rows == 0)
    block = tl.load(starts + EXPERTS + 1 + expert, mask=opens, other=0) + place // block_rows
    tl.store(blocks + 2 * block, expert, mask=opens)
    tl.store(blocks + 2 * block + 1, position, mask=opens)


@triton.jit
def sort_rows(
    index,  # [T, k] int32, at most MOST of them
    starts,  # [2, E + 1] int32, written as `start_rows` does
    rows,  # [T * k] int32, written
    blocks,  # [number of blocks, 2] int32, written
    tokens,
    block_rows,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    MOST: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Every program counts all rows, and places STEP of them, in their order."""
    wait_for_previous(OVERLAPS)
    count = tokens * TOP_K
    every = tl.arange(0, MOST)
    given = tl.load(index + every, mask=every < count, other=-1)
    chosen = tl.where(is_expert(given), nearest_expert(given, EXPERTS), -1)
    counts = tl.histogram(chosen, triton.next_power_of_2(EXPERTS), mask=is_expert(given))
    of_blocks = (counts + block_rows - 1) // block_rows
    ends, block_ends = tl.cumsum(counts, 0), tl.cumsum(of_blocks, 0)
    if tl.program_id(0) == 0:
        expert = tl.arange(0, triton.next_power_of_2(EXPERTS))
        tl.store(starts + expert + 1, ends, mask=expert < EXPERTS)
        tl.store(starts + EXPERTS + 2 + expert, block_ends, mask=expert < EXPERTS)
        tl.store(starts, 0)
        tl.store(starts + EXPERTS + 1, 0)
    row = tl.program_id(0) * STEP + tl.arange(0, STEP)
    own = tl.load(index + row, mask=row < count, other=-1)
    e, mask = nearest_expert(own, EXPERTS), is_expert(own)
    earlier = (chosen[None, :] == e[:, None]) & (every[None, :] < row[:, None])
    place = tl.sum(earlier.to(tl.int32), 1)
    position = tl.gather(ends - counts, e, 0) + place
    tl.store(rows + position, row, mask=mask)
    opens = mask & (place % block_rows == 0)
    block = tl.gather(block_ends - of_blocks, e, 0) + place // block_rows
    tl.store(blocks + 2 * block, e, mask=opens)
    tl.store(blocks + 2 * block + 1, position, mask=opens)
