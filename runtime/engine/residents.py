"""The sequences of an engine: those that wait, and those that have pages and a row of recurrent states."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from functools import partial

from moevlm.runtime.core.errors import DeadlineExceeded, MoevlmError, QueueFull, RequestError
from moevlm.runtime.engine.page_table import PageTable
from moevlm.runtime.engine.pages import PagePool
from moevlm.runtime.engine.rows import StateRow
from moevlm.runtime.engine.sequence import Sequence
from moevlm.runtime.engine.step import EngineLimits
from moevlm.runtime.request.prompt import SMALLER_IMAGES

# A snapshot within a prompt costs a step that is cut short, so there is none for fewer pages.
SNAPSHOT_PAGES = 4
# The last tokens of a prompt have the assistant begin; a template may leave some of them out in the next turn.
PROMPT_TAIL = 8


class Residents:
    """Gives pages and state rows to sequences, and takes them back. waiting, running: by age."""

    def __init__(self, limits: EngineLimits, pool: PagePool, chunk: int) -> None:
        """chunk: where prompts are cut if the engine is not packed."""
        self.pool = pool
        self._packed = limits.packed
        # Rows of a step that is not packed depend on how its prompt was cut, so what is shared was cut there, too.
        self._unit = 1 if limits.packed else chunk
        self._snapshot_unit, self._apart = (
            (limits.page_size, SNAPSHOT_PAGES * limits.page_size) if limits.packed else (chunk, chunk)
        )
        self._recurrent = pool.rows.rows > 0
        # An image that may not be cut has to fit beside a token of every other sequence of a step.
        others = min(limits.max_sequences, limits.max_logits) - 1 if limits.packed else 0
        self._longest = min(limits.max_tokens - others, limits.max_visual or limits.max_tokens)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._arrivals = 0
        self.preemptions = 0  # so far

    @property
    def queued(self) -> int:
        """How many wait for their first token; others go on, or their readers do not read."""
        return sum(not sequence.generated for sequence in tuple(self.waiting))

    def check(self, sequence: Sequence) -> None:
        """Raises RequestError for a sequence that the whole pool cannot hold, or an image that a step cannot."""
        if (longest := sequence.runs.longest) > self._longest:
            raise RequestError(
                f"an image has {longest} tokens, a step of the engine takes up to {self._longest} of one "
                f"({SMALLER_IMAGES})"
            )
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
        """Let a waiting sequence run, if the pages are there for all of its tokens, and a row.

        Its first `computed` tokens are known then. Returns copies of pages, to be made before its next step; None if
        it goes on waiting.
        """
        rows, content = self.pool.rows, bytes(sequence.content)
        if self._recurrent and not rows.available and not self._preempt_paused():
            return None
        table = PageTable(self.pool)
        begun = table.begin(content, partial(sequence.boundary, unit=self._unit))
        while not self._spare(table, sequence.tokens):
            if not self._preempt_paused():
                table.release()
                if begun.snapshot is not None:
                    rows.drop(begun.snapshot)
                return None
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_number)
        sequence.status, sequence.table, sequence.computed = "running", table, begun.tokens
        if self._recurrent:
            sequence.state = StateRow.begin(rows, begun.snapshot)
            sequence.snapshot_places = self._snapshot_places(sequence, begun.known)
        return begun.copies

    def _snapshot_places(self, sequence: Sequence, known: int) -> tuple[int, ...]:
        """Where chunks of its prompt end, rising, so that others can go on from there.

        At the last page of the prompt, with which its next turn begins whatever becomes of the answer; and where its
        beginning, which some sequence had, too, goes on otherwise. The end of a sequence is a snapshot anyway.
        """
        places, least = [], sequence.computed + self._apart
        for end in (known, sequence.prompt_tokens - PROMPT_TAIL):
            place = sequence.boundary(end, self._snapshot_unit)
            if place >= least:
                places.append(place)
                least = place + self._apart
        return tuple(places)

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
        self.running = []
        self.waiting = sorted((one for one in sequences if one.status != "ended" and not one.finished), key=_number)
        for sequence in sequences:
            sequence.status = "waiting" if sequence in self.waiting else "ended"
            sequence.computed, sequence.state, sequence.table = 0, None, None

    def stop(self, sequence: Sequence, computed: int) -> None:
        """Give back what a running sequence has. computed: its first tokens, as far as their pages are sure.

        Its row becomes a snapshot where it holds what others may use.
        """
        table, state = sequence.table, sequence.state
        assert table is not None
        sequence.computed = min(sequence.computed, computed)
        shared = self.shareable(sequence)
        table.share(sequence.content, shared)
        if state is not None:
            state.end(table.snapshots(shared) if 0 < shared == sequence.computed else None)
        table.release()
        sequence.table = sequence.state = None
        self.running.remove(sequence)

    def snapshot(self, sequence: Sequence) -> None:
        """Keep the recurrent states behind its computed tokens, if it is at one of its places for that."""
        if sequence.computed in sequence.snapshot_places:
            assert sequence.state is not None and sequence.table is not None
            sequence.state.snapshot(*sequence.table.snapshots(sequence.computed))

    def shareable(self, sequence: Sequence) -> int:
        """How many of the computed tokens others may use."""
        if self._packed:
            return sequence.computed
        return sequence.boundary(min(sequence.computed, sequence.prompt_tokens), self._unit)


def _number(sequence: Sequence) -> int:
    return sequence.number
