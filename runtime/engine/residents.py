"""The sequences of an engine: those that wait, and those that have pages."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from moevlm.runtime.core.errors import DeadlineExceeded, MoevlmError, QueueFull, RequestError
from moevlm.runtime.engine.page_table import PageTable
from moevlm.runtime.engine.pages import PagePool
from moevlm.runtime.engine.sequence import Sequence
from moevlm.runtime.engine.step import EngineLimits


class Residents:
    """Gives pages and state rows to sequences, and takes them back. waiting, running: by age."""

    def __init__(self, limits: EngineLimits, pool: PagePool, chunk: int, rows: int) -> None:
        """chunk: where prompts are cut if the engine is not packed. rows: see Scheduler."""
        self.pool = pool
        self._packed = limits.packed
        # Rows of a step that is not packed depend on how its prompt was cut, so what is shared was cut there, too.
        self._unit = None if rows else 1 if limits.packed else chunk
        self._all_rows = range(rows - 1, 0, -1)
        self._rows = list(self._all_rows)
        self._recurrent = rows > 0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._arrivals = 0
        self.preemptions = 0  # so far

    @property
    def queued(self) -> int:
        """How many wait for their first token; others go on, or their readers do not read."""
        return sum(not sequence.generated for sequence in tuple(self.waiting))

    def check(self, sequence: Sequence) -> None:
        """Raises RequestError for a sequence that the whole pool cannot hold."""
        most = (self.pool.pages - 1) * self.pool.page_size
        if sequence.limit > most:
            raise RequestError(f"the request may take {sequence.limit} tokens, the cache has room for {most}")

    def add(self, sequence: Sequence, waiting: int | None) -> None:
        """See Scheduler.add."""
        self.check(sequence)
        if waiting is not None and self.queued >= waiting:
            raise QueueFull(f"{self.queued} requests wait already (allowed: {waiting})")
        self._arrivals += 1
        sequence.number, sequence.status = self._arrivals, "waiting"
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, error: MoevlmError | None = None) -> None:
        """End a sequence that no step computes now: its pages are free. Once more does nothing."""
        if sequence.status == "waiting":
            self.waiting.remove(sequence)
        elif sequence.status == "running":
            self.stop(sequence, sequence.computed)
        if sequence.status != "ended":
            sequence.status, sequence.error = "ended", error

    def sweep(self, now: float) -> list[Sequence]:
        """End sequences that were cancelled or are too late, between two steps. Returns them."""
        swept = []
        for sequence in (*self.running, *self.waiting):
            late = sequence.deadline is not None and now >= sequence.deadline
            if late or sequence.cancellation.cancelled:
                self.remove(sequence, DeadlineExceeded("the request's deadline has passed") if late else None)
                swept.append(sequence)
        return swept

    def next_waiting(self) -> Sequence | None:
        """The oldest that waits for pages."""
        return next((sequence for sequence in self.waiting if not sequence.paused), None)

    def admit(self, sequence: Sequence) -> tuple[tuple[int, int], ...] | None:
        """Let a waiting sequence run, if the pages are there for all of its tokens.

        Its first `computed` tokens are known then. Returns copies of pages, to be made before its next step; None if
        it goes on waiting.
        """
        if self._recurrent and not self._rows and not self._preempt_paused():
            return None
        table = PageTable(self.pool, self._unit)
        start, copies = table.begin(bytes(sequence.content))
        while not self._spare(table, sequence.tokens):
            if not self._preempt_paused():
                table.release(sequence.content, 0)
                return None
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_number)
        sequence.status, sequence.table, sequence.computed = "running", table, start
        sequence.state_row = self._rows.pop() if self._recurrent else 0
        return copies

    def _spare(self, table: PageTable, tokens: int) -> bool:
        """Whether the pool has pages for them, and the next one of each running sequence."""
        growing = sum(min(one.table.missing(one.limit), 1) for one in self.running if one.table)
        return table.missing(tokens) + growing <= self.pool.available

    def room(self, sequence: Sequence, tokens: int) -> bool:
        """Have pages for so many tokens, if need be those of one that is paused, or of the youngest.

        False if that is the sequence itself.
        """
        assert sequence.table is not None
        while not sequence.table.grow(tokens):
            paused = [one for one in self.running if one.paused]
            victim = (paused or self.running)[-1]
            self.preempt(victim, victim.computed)
            if victim is sequence:
                return False
        return True

    def _preempt_paused(self) -> bool:
        """Take the pages and the row of the youngest sequence whose reader is behind; False if there is none."""
        paused = [one for one in self.running if one.paused]
        if paused:
            self.preempt(paused[-1], paused[-1].computed)
        return bool(paused)

    def preempt(self, sequence: Sequence, computed: int) -> None:
        """Have a running sequence wait again. computed: see `stop`."""
        self.stop(sequence, computed)
        self.preemptions += 1
        sequence.status, sequence.computed = "waiting", 0
        insort(self.waiting, sequence, key=_number)

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Have all sequences wait, whatever state an interrupt left them, the pages and the rows in."""
        self.pool.restart()
        self._rows = list(self._all_rows)
        self.running = []
        self.waiting = sorted((one for one in sequences if one.status != "ended" and not one.finished), key=_number)
        for sequence in sequences:
            sequence.status = "waiting" if sequence in self.waiting else "ended"
            sequence.computed, sequence.state_row, sequence.table = 0, 0, None

    def stop(self, sequence: Sequence, computed: int) -> None:
        """Give back what a running sequence has. computed: its first tokens, as far as their pages are sure."""
        assert sequence.table is not None
        sequence.computed = min(sequence.computed, computed)
        sequence.table.release(sequence.content, self.shareable(sequence))
        sequence.table = None
        self.running.remove(sequence)
        if self._recurrent:
            self._rows.append(sequence.state_row)
            sequence.state_row = 0

    def shareable(self, sequence: Sequence) -> int:
        """How many of the computed tokens others may use."""
        if self._unit is None:
            return 0
        if self._packed:
            return sequence.computed
        return min(sequence.computed, sequence.prompt_tokens) // self._unit * self._unit


def _number(sequence: Sequence) -> int:
    return sequence.number
