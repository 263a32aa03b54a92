"""Which tokens of which sequences an engine computes next. No threads, no engine, no clock: data in, data out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial

import msgspec

from moevlm.runtime.core.errors import EngineError, MoevlmError, reason
from moevlm.runtime.engine.pages import PagePool
from moevlm.runtime.engine.residents import Residents
from moevlm.runtime.engine.sequence import Sequence
from moevlm.runtime.engine.step import EngineLimits, StepOutput
from moevlm.runtime.request.candidates import CandidateRow
from moevlm.runtime.request.sampling_together import chosen_together


class Part(msgspec.Struct, frozen=True, eq=False):
    """Tokens start to stop of a sequence, the last of them behind which its next token is chosen, or not.

    copies, cleared, row_copies: see Step; of this sequence.
    """

    sequence: Sequence
    start: int
    stop: int
    last: bool
    copies: tuple[tuple[int, int], ...] = ()
    cleared: tuple[int, ...] = ()
    row_copies: tuple[tuple[int, int], ...] = ()


class Scheduler:
    """First come, first served: decodes of all running sequences first, then prompts in chunks.

    A running sequence has pages. One that needs a page where none is left takes those of the youngest, which starts
    again from its tokens later. A prompt is cut at fixed places: multiples of a page on a packed engine, or of its
    mixed_tokens beside decodes if they are fewer; multiples of the most tokens of a step on others, where a chunk has a
    step of its own. On a packed engine it is cut where a snapshot of recurrent states is made, too. Where images are
    whole, a cut within one moves behind it, or before it where the step has no room for that.
    """

    def __init__(
        self,
        limits: EngineLimits,
        pool: PagePool,
        *,
        vocabulary: int,
        chunk_tokens: int,
    ) -> None:
        """chunk_tokens: the most prompt tokens in a step."""
        self._limits, self._vocabulary = limits, vocabulary
        self._chunk = min(chunk_tokens, limits.max_tokens, limits.max_visual or chunk_tokens)
        self._mixed = min(limits.mixed_tokens or self._chunk, self._chunk)
        self._most = min(limits.max_sequences, limits.max_logits, limits.max_tokens)
        self._all = Residents(limits, pool, self._chunk)
        self._steps = 0

    @property
    def waiting(self) -> int:
        """Sequences without pages."""
        return len(self._all.waiting)

    @property
    def queued(self) -> int:
        """Sequences without pages that wait for their first token."""
        return self._all.queued

    @property
    def running(self) -> int:
        """Sequences with pages."""
        return len(self._all.running)

    @property
    def used_pages(self) -> int:
        """Pages of running sequences, a shared one once."""
        return self._all.pool.pages - 1 - self._all.pool.available

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that have not ended."""
        return (*self._all.running, *self._all.waiting)

    def forget(self) -> None:
        """Share nothing that was computed before with sequences to come."""
        self._all.pool.forget()

    def check(self, sequence: Sequence) -> None:
        """Raises RequestError for a sequence that the whole pool cannot hold, or an image that a step cannot."""
        self._all.check(sequence)

    def add(self, sequence: Sequence, waiting: int | None = None) -> None:
        """Take in a new sequence. Raises RequestError as `check` does, and QueueFull beside `waiting` that wait."""
        self._all.add(sequence, waiting)
        sequence.stepped = self._steps

    def remove(self, sequence: Sequence, error: MoevlmError | None = None) -> None:
        """End a sequence that no step computes now: its pages are free. Once more does nothing."""
        self._all.remove(sequence, error)

    def sweep(self, now: float) -> list[Sequence]:
        """End sequences that were cancelled or are too late, between two steps. Returns them."""
        return self._all.sweep(now)

    def schedule(self) -> tuple[Part, ...]:
        """The next step; empty where no sequence can go on. Then comes `finish`, `fail` or `abort` for each part."""
        self._steps += 1
        draft = self._packed_step if self._limits.packed else self._plain_step
        while True:
            before = self._all.preemptions
            parts = draft()
            if parts or self._all.preemptions == before:
                return tuple(parts)

    def finish(self, parts: Collection[Part], output: StepOutput, started: float) -> list[Sequence]:
        """Take what a step made: each sequence whose last token it computed has one more piece, or has ended.

        parts: of a step that ran. started: when, by perf_counter(). Returns these sequences, and those that were
        cancelled meanwhile.
        """
        made: list[Sequence] = []
        candidates = output.candidates
        values, ids, totals = candidates.values, candidates.ids, candidates.log_sum_exp
        tokens = chosen_together([part.sequence.sampler for part in parts if part.last], values, ids, totals)
        rows = enumerate(zip(values, ids, totals.tolist(), tokens, strict=True))
        for part in parts:
            sequence = part.sequence
            assert sequence.table is not None
            sequence.stepped = self._steps
            if sequence.state is not None:
                sequence.state.stepped()
            if part.last:
                made.append(sequence)
                place, (scores, names, total, token) = next(rows)
                row = CandidateRow(scores, names, total, self._vocabulary, partial(output.logits, place))
                try:
                    ended = sequence.accept(row, started, token).finish_reason is not None
                except BaseException as error:  # what it computed may be as wrong as its logits
                    self.fail([part], error)
                    if isinstance(error, Exception):
                        continue
                    raise
            else:
                sequence.count_seconds(started)
                ended = False
            sequence.computed = part.stop
            if part.stop // self._limits.page_size > sequence.table.shared:
                sequence.table.filled(sequence.content, self._all.shareable(sequence))
            self._all.snapshot(sequence)
            if ended or sequence.cancellation.cancelled:
                self.remove(sequence)
                if not part.last:
                    made.append(sequence)
        return made

    def fail(self, parts: Iterable[Part], error: BaseException) -> None:
        """A step went wrong: its sequences end with the error."""
        for part in parts:
            if part.sequence.status == "running":
                self._all.stop(part.sequence, 0)
                part.sequence.status, part.sequence.error = "ended", _engine_error(error)

    def abort(self, parts: Iterable[Part]) -> None:
        """A step was interrupted, and nobody knows how far it came: its sequences start again from their tokens."""
        for part in parts:
            if part.sequence.status == "running":
                self._all.preempt(part.sequence, 0)

    def restart(self, sequences: Iterable[Sequence], error: Exception | None = None) -> None:
        """Between `schedule` and `finish` something was interrupted, at any place. Whatever was shared is forgotten.

        sequences: all that there were. They start again from their tokens, or end with the error.
        """
        self._all.restart(sequences)
        if error is not None:
            for sequence in self.sequences:
                self.remove(sequence, _engine_error(error))

    def _packed_step(self) -> list[Part]:
        """One token of each running sequence, and chunks of prompts as far as they fit beside."""
        ready = [(sequence, sequence.decoding) for sequence in self._selected()]
        decodes = sum(decoding for _, decoding in ready)
        # Cut at fixed places, so that the same prompt is cut alike whatever the load.
        budget = min(self._mixed if decodes else self._chunk, self._limits.max_tokens - decodes)
        room = self._room(decodes)
        unit = min(self._limits.page_size, budget)
        parts: list[Part] = []
        for sequence, decoding in ready:
            if sequence.status != "running":
                continue  # an older one took its pages
            start = sequence.computed
            stop = sequence.tokens if decoding else _cut(sequence, budget, unit, room)
            if stop > start and self._all.room(sequence, stop):
                taken = 0 if decoding else stop - start
                budget, room = budget - taken, room - taken
                parts.append(_part(sequence, stop))
        while budget >= unit > 0 and len(parts) < self._most and (admitted := self._admitted(budget, unit, room)):
            taken = admitted.stop - admitted.start
            budget, room = budget - taken, room - taken
            parts.append(admitted)
        return parts

    def _plain_step(self) -> list[Part]:
        """One token of each running sequence, or one chunk of a prompt: whoever waits longest has the turn."""
        ready, waiting = self._selected(), self._all.next_waiting()
        for turn in sorted([*ready, *([waiting] if waiting else [])], key=lambda one: (one.stepped, one.number)):
            if turn.status == "waiting":
                admitted = self._admitted(self._chunk, self._chunk, self._room(0))
                if admitted:
                    return [admitted]
            elif turn.decoding:
                decodes = [one for one in ready if one.decoding]
                return self._grown(decodes)
            elif self._all.room(turn, stop := _cut(turn, self._chunk, self._chunk, self._room(0))):
                return [_part(turn, stop)]
        return []

    def _grown(self, decodes: list[Sequence]) -> list[Part]:
        """A token of each; without those whose pages an older one took."""
        return [
            _part(one, one.tokens) for one in decodes if one.status == "running" and self._all.room(one, one.tokens)
        ]

    def _selected(self) -> list[Sequence]:
        """Running sequences for one step, by age: of too many those that waited longest."""
        ready = [sequence for sequence in self._all.running if not sequence.paused]
        if len(ready) > self._most:
            ready = sorted(
                sorted(ready, key=lambda one: (one.stepped, one.number))[: self._most], key=lambda one: one.number
            )
        return ready

    def _room(self, decodes: int) -> int:
        """How many tokens of prompts a step can hold, whatever it should."""
        return min(self._limits.max_tokens - decodes, self._limits.max_visual or self._limits.max_tokens)

    def _admitted(self, budget: int, unit: int, room: int) -> Part | None:
        """The first chunk of the sequence that waits longest, if it gets pages. budget: one unit or more."""
        sequence = self._all.next_waiting()
        if sequence is None or sequence.runs.longest > room or (copies := self._all.admit(sequence)) is None:
            return None
        stop = _cut(sequence, budget, unit, room)
        self._all.room(sequence, stop)  # there is: it was admitted
        return _part(sequence, stop, copies)


def _part(sequence: Sequence, stop: int, copies: tuple[tuple[int, int], ...] = ()) -> Part:
    """Its tokens up to `stop`, the next ones. copies: of pages, before its first step."""
    start, state, last = sequence.computed, sequence.state, stop == sequence.tokens
    if state is None:
        return Part(sequence, start, stop, last, copies)
    return Part(sequence, start, stop, last, copies, state.cleared, state.row_copies)


def _cut(sequence: Sequence, budget: int, unit: int, room: int) -> int:
    """Where its next chunk, of some `budget` tokens, ends: with the tokens, at a multiple of `unit`, for a snapshot.

    Behind an image that is not cut if it fits into `room` tokens, else before it.
    """
    start = sequence.computed
    stop = start + budget
    stop = sequence.tokens if stop >= sequence.tokens else stop // unit * unit
    stop = min([stop, *(place for place in sequence.snapshot_places if place > start)])
    run = sequence.runs.around(stop)
    if run is None:
        return stop
    begin, end = run
    return end if end - start <= room else max(begin, start)


def _engine_error(error: BaseException) -> MoevlmError:
    """What the clients of a sequence are told."""
    if isinstance(error, MoevlmError):
        return error
    wrapped = EngineError(f"the engine failed: {reason(error)}")
    wrapped.__cause__ = error
    return wrapped
