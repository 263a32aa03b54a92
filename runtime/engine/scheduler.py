"""Which tokens of which sequences an engine computes next. No threads, no engine, no clock: data in, data out."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from moevlm.runtime.core.errors import DeadlineExceeded, MoevlmError, QueueFull, RequestError
from moevlm.runtime.engine.page_table import PageTable
from moevlm.runtime.engine.pages import PagePool
from moevlm.runtime.engine.sequence import Sequence
from moevlm.runtime.engine.step import EngineLimits, StepOutput
from moevlm.runtime.request.candidates import CandidateRow

# Prompt tokens beside running decodes: a step takes at most about twice as long as one of decodes alone.
MIXED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens start to stop of a sequence. copies, cleared: see Step; of this sequence."""

    sequence: Sequence
    start: int
    stop: int
    copies: tuple[tuple[int, int], ...] = ()
    cleared: tuple[int, ...] = ()

    @property
    def last(self) -> bool:
        """Whether the sequence's next token is chosen after it."""
        return self.stop == self.sequence.tokens


class Scheduler:
    """First come, first served: decodes of all running sequences first, then prompts in chunks.

    A running sequence has pages. One that needs a page where none is left takes those of the youngest, which starts
    again from its tokens later. A prompt is cut at fixed places: multiples of a page on a packed engine, or of
    MIXED_TOKENS beside decodes; multiples of the most tokens of a step on others, where a chunk has a step of its own.
    """

    def __init__(
        self,
        limits: EngineLimits,
        pool: PagePool,
        *,
        vocabulary: int,
        chunk_tokens: int,
        rows: int = 0,
        waiting: int | None = None,
    ) -> None:
        """chunk_tokens: the most prompt tokens in a step. rows: of recurrent states, 0 for a model without.

        waiting: the most sequences that wait for their first step; None for any number.
        """
        self._limits, self._pool, self._vocabulary = limits, pool, vocabulary
        self._chunk = min(chunk_tokens, limits.max_tokens, limits.max_visual or chunk_tokens)
        self._most = min(limits.max_sequences, limits.max_logits, limits.max_tokens)
        # Rows of a step that is not packed depend on how its prompt was cut, so what is shared was cut there, too.
        self._unit = None if rows else 1 if limits.packed else self._chunk
        self._rows = list(range(rows - 1, 0, -1))
        self._recurrent = rows > 0
        self._most_waiting = waiting
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._arrivals = self._steps = self._preemptions = 0

    @property
    def waiting(self) -> int:
        """Sequences without pages."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with pages."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Raises QueueFull, and RequestError for a sequence that the whole pool cannot hold."""
        if self._most_waiting is not None and len(self._waiting) >= self._most_waiting:
            raise QueueFull(f"{len(self._waiting)} requests wait already (allowed: {self._most_waiting})")
        most = (self._pool.pages - 1) * self._pool.page_size
        if sequence.limit > most:
            raise RequestError(f"the request may take {sequence.limit} tokens, the cache has room for {most}")
        self._arrivals += 1
        sequence.number, sequence.stepped, sequence.status = self._arrivals, self._steps, "waiting"
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence, error: MoevlmError | None = None) -> None:
        """End a sequence that no step computes now: its pages are free. Once more does nothing."""
        if sequence.status == "waiting":
            self._waiting.remove(sequence)
        elif sequence.status == "running":
            self._stop(sequence, sequence.computed)
        if sequence.status != "ended":
            sequence.status, sequence.error = "ended", error

    def sweep(self, now: float) -> list[Sequence]:
        """End sequences that were cancelled or are too late, between two steps. Returns them."""
        swept = []
        for sequence in (*self._running, *self._waiting):
            late = sequence.deadline is not None and now >= sequence.deadline
            if late or sequence.cancellation.cancelled:
                self.remove(sequence, DeadlineExceeded("the request's deadline has passed") if late else None)
                swept.append(sequence)
        return swept

    def schedule(self) -> tuple[Part, ...]:
        """The next step; empty where no sequence can go on. Then comes `finish`, `fail` or `abort` for each part."""
        self._steps += 1
        draft = self._packed_step if self._limits.packed else self._plain_step
        while True:
            before = self._preemptions
            parts = draft()
            if parts or self._preemptions == before:
                return tuple(parts)

    def finish(self, parts: Iterable[Part], output: StepOutput, started: float) -> list[Sequence]:
        """Take what a step made: each sequence whose last token it computed has one more piece, or has ended.

        parts: of a step that ran. started: when, by perf_counter(). Returns these sequences.
        """
        made: list[Sequence] = []
        candidates = output.candidates
        rows = zip(candidates.values, candidates.ids, candidates.log_sum_exp.tolist(), strict=True)
        for part in parts:
            sequence, last = part.sequence, part.last
            assert sequence.table is not None
            sequence.computed, sequence.stepped = part.stop, self._steps
            sequence.table.filled(sequence.content, self._shareable(sequence))
            if not last:
                sequence.count_seconds(started)
            else:
                values, ids, total = next(rows)
                logits = partial(output.logits, len(made))
                made.append(sequence)
                try:
                    piece = sequence.accept(CandidateRow(values, ids, total, self._vocabulary, logits), started)
                except MoevlmError as error:
                    self.remove(sequence, error)
                else:
                    if piece.finish_reason is not None:
                        self.remove(sequence)
            if sequence.cancellation.cancelled:
                self.remove(sequence)
        return made

    def fail(self, parts: Iterable[Part], error: MoevlmError) -> None:
        """A step went wrong: its sequences end with the error."""
        for part in parts:
            if part.sequence.status == "running":
                self._stop(part.sequence, 0)
                part.sequence.status, part.sequence.error = "ended", error

    def abort(self, parts: Iterable[Part]) -> None:
        """A step was interrupted, and nobody knows how far it came: its sequences start again from their tokens."""
        for part in parts:
            if part.sequence.status == "running":
                self._preempt(part.sequence, 0)

    def _packed_step(self) -> list[Part]:
        """One token of each running sequence, and chunks of prompts as far as they fit beside."""
        ready = self._selected()
        decodes = sum(sequence.decoding for sequence in ready)
        # Cut at fixed places, so that the same prompt is cut alike whatever the load.
        budget = min(MIXED_TOKENS if decodes else self._chunk, self._chunk, self._limits.max_tokens - decodes)
        unit = min(MIXED_TOKENS if decodes else self._pool.page_size, budget)
        parts: list[Part] = []
        for sequence in ready:
            if sequence.status != "running":
                continue  # an older one took its pages
            stop = sequence.tokens if sequence.decoding else _cut(sequence, sequence.computed, budget, unit)
            if stop > sequence.computed and self._room(sequence, stop):
                budget -= 0 if sequence.decoding else stop - sequence.computed
                parts.append(Part(sequence, sequence.computed, stop))
        while budget > 0 and len(parts) < self._most and (admitted := self._admit(budget, unit)):
            budget -= admitted.stop - admitted.start
            parts.append(admitted)
        return parts

    def _plain_step(self) -> list[Part]:
        """One token of each running sequence, or one chunk of a prompt: whoever waits longest has the turn."""
        ready = self._selected()
        for turn in sorted([*ready, *self._next_waiting()], key=lambda one: (one.stepped, one.number)):
            if turn.status == "waiting":
                admitted = self._admit(self._chunk, self._chunk)
                if admitted:
                    return [admitted]
            elif turn.decoding:
                decodes = [one for one in ready if one.decoding]
                return self._grown(decodes)
            elif self._room(turn, stop := _cut(turn, turn.computed, self._chunk, self._chunk)):
                return [Part(turn, turn.computed, stop)]
        return []

    def _grown(self, decodes: list[Sequence]) -> list[Part]:
        """A token of each; without those whose pages an older one took."""
        return [
            Part(one, one.computed, one.tokens)
            for one in decodes
            if one.status == "running" and self._room(one, one.tokens)
        ]

    def _selected(self) -> list[Sequence]:
        """Running sequences for one step, by age: of too many those that waited longest."""
        ready = [sequence for sequence in self._running if not sequence.paused]
        if len(ready) > self._most:
            ready = sorted(sorted(ready, key=lambda one: (one.stepped, one.number))[: self._most], key=_number)
        return ready

    def _next_waiting(self) -> list[Sequence]:
        return [sequence for sequence in self._waiting if not sequence.paused][:1]

    def _admit(self, budget: int, unit: int) -> Part | None:
        """The first chunk of the sequence that waits longest, if the pages are there for all of its tokens."""
        for sequence in self._next_waiting():
            if self._recurrent and not self._rows:
                return None
            table = PageTable(self._pool, self._unit)
            start, copies = table.begin(bytes(sequence.content))
            stop = _cut(sequence, start, budget, unit)
            if stop <= start:
                table.release(sequence.content, 0)
                return None
            while not self._spare(table, sequence.tokens):
                paused = [one for one in self._running if one.paused]
                if not paused:
                    table.release(sequence.content, 0)
                    return None
                self._preempt(paused[-1], paused[-1].computed)
            self._waiting.remove(sequence)
            insort(self._running, sequence, key=_number)
            sequence.status, sequence.table, sequence.computed = "running", table, start
            sequence.state_row = self._rows.pop() if self._recurrent else 0
            table.grow(stop)
            return Part(sequence, start, stop, copies, (sequence.state_row,) if self._recurrent else ())
        return None

    def _spare(self, table: PageTable, tokens: int) -> bool:
        """Whether the pool has pages for them, and the next one of each running sequence."""
        growing = sum(min(one.table.missing(one.limit), 1) for one in self._running if one.table)
        return table.missing(tokens) + growing <= self._pool.available

    def _room(self, sequence: Sequence, tokens: int) -> bool:
        """Have pages for so many tokens, if need be those of one that is paused, or of the youngest.

        False if that is the sequence itself.
        """
        assert sequence.table is not None
        while not sequence.table.grow(tokens):
            paused = [one for one in self._running if one.paused]
            victim = (paused or self._running)[-1]
            self._preempt(victim, victim.computed)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, computed: int) -> None:
        self._stop(sequence, computed)
        self._preemptions += 1
        sequence.status, sequence.computed = "waiting", 0
        insort(self._waiting, sequence, key=_number)

    def _stop(self, sequence: Sequence, computed: int) -> None:
        """Give back what a running sequence has. computed: its first tokens, as far as their pages are sure."""
        assert sequence.table is not None
        sequence.computed = min(sequence.computed, computed)
        sequence.table.release(sequence.content, self._shareable(sequence))
        sequence.table = None
        self._running.remove(sequence)
        if self._recurrent:
            self._rows.append(sequence.state_row)
            sequence.state_row = 0

    def _shareable(self, sequence: Sequence) -> int:
        """How many of the computed tokens others may use."""
        if self._unit is None:
            return 0
        return (
            sequence.computed
            if self._limits.packed
            else min(sequence.computed, sequence.prompt_tokens) // self._unit * self._unit
        )


def _cut(sequence: Sequence, start: int, budget: int, unit: int) -> int:
    """Where a chunk of at most `budget` tokens ends: with the tokens, or at a multiple of `unit`."""
    stop = start + budget
    return sequence.tokens if stop >= sequence.tokens else stop // unit * unit


def _number(sequence: Sequence) -> int:
    return sequence.number
