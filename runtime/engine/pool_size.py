"""How many pages and state rows an engine is given, from the memory that they may take."""

from __future__ import annotations

from dataclasses import dataclass

from moevlm.runtime.core.errors import RefusedOption
from moevlm.runtime.core.states import StateSpec, page_bytes, row_bytes
from moevlm.runtime.engine.step import EngineLimits

SEQUENCES = 32  # requests that have pages at the same time where a step takes fewer, the others wait


@dataclass(frozen=True)
class PoolSize:
    """pages, rows: page 0 and row 0 included, which are no sequence's. rows is 0 without recurrent states.

    Rows that no sequence has are snapshots, see RowPool.
    """

    pages: int
    rows: int

    @classmethod
    def of(
        cls, limits: EngineLimits, states: tuple[StateSpec, ...], context: int, cache_memory: int | None
    ) -> PoolSize:
        """As much as the requests of a step can use, of `context` tokens each, and SEQUENCES of them at least.

        Each of them may have a row and a snapshot, which take up to half of the memory, unless that is less than a row.
        Within `cache_memory` bytes if that is given, and within what the engine has. Raises RequestError for more than
        that, and where the memory holds not even one page.
        """
        if cache_memory is None:
            cache_memory = limits.cache_memory
        elif limits.cache_memory is not None and cache_memory > limits.cache_memory:
            most = f"up to {limits.cache_memory} bytes, the memory that the engine leaves free"
            raise RefusedOption("cache_memory", cache_memory, most)
        sequences = max(limits.max_sequences, SEQUENCES)
        page, row = page_bytes(states, limits.page_size), row_bytes(states)
        rows = rows_of(sequences) if row else 0
        each = -(-context // limits.page_size)
        pages = 1 + sequences * each
        if limits.max_pages is not None:
            pages = min(pages, limits.max_pages)
        if cache_memory is None:
            return cls(pages, rows)
        if row:
            rows = min(rows, rows_within(cache_memory, page, row))
        if not page:
            return cls(pages, rows)
        fitting = (cache_memory - rows * row) // page
        if each == 1:  # the engine lets a page grow with its sequence, whatever a whole one would take
            fitting = max(fitting, 2)
        if fitting < 2:
            least = f"{2 * (row + page)} bytes or more, {limits.page_size} tokens"
            raise RefusedOption("cache_memory", cache_memory, least)
        return cls(min(pages, fitting), rows)


def rows_of(sequences: int) -> int:
    """Rows that are of use: one and a snapshot for each sequence that runs at the same time, and row 0."""
    return 1 + 2 * sequences


def rows_within(memory: int, page: int, row: int) -> int:
    """Rows of recurrent states in memory that they share with pages: half of it, two pages left out, two rows at least.

    page, row: bytes of one, page 0 for a model without pages.
    """
    return max(2, (min(memory // 2, memory - 2 * page) if page else memory) // row)
