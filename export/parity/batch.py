"""Prompts of parity in an engine: prefill in chunks, then one token at a time, as many together as a step takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np

from moevlm.export.parity.batch_sequence import BatchSequence, LogitPlaces, Span
from moevlm.export.parity.tolerances import DECODE_STEPS
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.states import Recurrent
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.step import EngineLimits, Step, StepOutput
from moevlm.runtime.engine.visual import VisualFeatures, rows_between, step_features
from moevlm.runtime.request.prompt import Prompt

Array = np.ndarray


@dataclass(frozen=True)
class BatchLimits:
    """sequences: prompts stepped together. tokens, logits: of a step. page_size: tokens of a page.

    steps: decode steps behind the longest prompt, as many as wanted where the context has room for them.
    """

    sequences: int
    tokens: int
    logits: int
    page_size: int
    steps: int

    @classmethod
    def of(cls, prompts: Sequence[Prompt], limits: EngineLimits, steps: int = DECODE_STEPS) -> Self:
        """Raises RequestError if not one step behind a prompt fits."""
        longest = max(len(prompt.ids) for prompt in prompts)
        if (needed := longest + min(steps, 1)) > limits.max_context:
            raise RequestError(f"parity needs a context of {needed} tokens, the engine has {limits.max_context}")
        steps = min(steps, limits.max_context - longest)
        return cls(limits.max_sequences, limits.max_tokens, limits.max_logits, limits.page_size, steps)


class Batch:
    """Prompts in an engine's pool, which it reserves: of an engine's batches only the last is of use.

    A sequence's state row is one above its number, and another row waits for a copy of it. Its pages fall, so that none
    lies where its place would say.
    """

    def __init__(
        self,
        engine: Engine,
        model: ModelMetadata,
        prompts: Sequence[Prompt],
        visual: Sequence[VisualFeatures],
        limits: BatchLimits,
    ) -> None:
        """visual: features of the images of all prompts, in order."""
        self._engine, self._visual, self._limits = engine, visual, limits
        self._whole_images = model.bidirectional_images
        self._sequences: list[BatchSequence] = []
        rows, pages = 0, 0
        for prompt in prompts:
            count = -(-(len(prompt.ids) + limits.steps) // limits.page_size)
            own = np.arange(pages + count, pages, -1, dtype=np.int32)
            self._sequences.append(BatchSequence(prompt, model, limits.steps, rows, own))
            rows, pages = rows + prompt.image_tokens, pages + count
        self._recurrent = any(isinstance(state, Recurrent) for state in engine.states)
        engine.reserve(1 + pages, 1 + 2 * len(prompts))

    def prefill(self, chunk_tokens: int | None = None, every_position: bool = False) -> Array:
        """Run the prompts through the decoder, `chunk_tokens` of each at a time (None: as many as a step takes).

        Returns logits [B, vocabulary] float32 of each prompt's last token, or, with every_position,
        [sum of prompt lengths, vocabulary], prompt after prompt.
        """
        places = LogitPlaces(self._sequences, every_position)
        logits: Array | None = None
        for spans in self._chunks(chunk_tokens or self._limits.tokens):
            index, targets = places.of(spans)
            # Where a step has no room for so many rows it is run again: it keeps the same keys and values each time,
            # and begins with the same recurrent states.
            rounds = range(0, max(len(index), 1), self._limits.logits)
            for first in rounds:
                part = slice(first, first + self._limits.logits)
                copies = self._row_copies(spans, back=first > 0) if len(rounds) > 1 else ()
                output = self._forward(spans, index[part], copies)
                for i, target in enumerate(targets[part]):
                    row = output.logits(i)
                    logits = np.empty((places.total, len(row)), np.float32) if logits is None else logits
                    logits[target] = row
        assert logits is not None  # a prompt has at least one token
        return logits

    def prefill_outputs(self) -> tuple[Array, dict[str, Array]]:
        """Run the prompts through the decoder, as many tokens in a step as it takes.

        Returns logits of every position, and the engine's debug outputs by name, both prompt after prompt.
        """
        places = LogitPlaces(self._sequences, every_position=True)
        kept: dict[str, Array] = {}
        for spans in self._chunks(self._limits.tokens):
            index, targets = places.of(spans)
            output = self._forward(spans, index)
            rows = {"logits": np.stack([output.logits(i) for i in range(len(index))]), **output.outputs}
            for name, values in rows.items():
                if name not in kept:
                    kept[name] = np.empty((places.total, *values.shape[1:]), values.dtype)
                kept[name][targets] = values
        logits = kept.pop("logits")
        return logits, kept

    def decode(self, tokens: Sequence[int]) -> Array:
        """Append one token to each sequence. Returns logits [B, vocabulary] float32 of what follows it."""
        rows: list[Array] = []
        for sequence, token in zip(self._sequences, tokens, strict=True):
            sequence.ids[sequence.length] = token
        spans = [Span(n, sequence.length, sequence.length + 1) for n, sequence in enumerate(self._sequences)]
        together = min(self._limits.sequences, self._limits.tokens, self._limits.logits)
        for first in range(0, len(spans), together):
            part = spans[first : first + together]
            output = self._forward(part, np.arange(len(part)))
            rows += [output.logits(i) for i in range(len(part))]
        return np.stack(rows)

    def mixed(self, chunk_tokens: int, tokens: Array) -> tuple[Array, Array]:
        """Run the prompts in chunks, and behind each, one by one, its `tokens`, while others still have chunks to go.

        tokens: [steps, B], what follows each prompt. The sequences of a step come in another order each time.
        Returns logits [sum of prompt lengths, vocabulary] of all positions, and [steps, B, vocabulary].
        """
        prompts, steps = [sequence.prompt for sequence in self._sequences], len(tokens)
        offsets = np.cumsum([0, *(prompt + steps for prompt in prompts)])
        for sequence, follows in zip(self._sequences, tokens.T, strict=True):
            sequence.ids[sequence.prompt : sequence.prompt + steps] = follows
        rows: dict[int, Array] = {}
        for spans in self._mixtures(chunk_tokens, steps):
            places = np.concatenate([offsets[span.number] + np.arange(span.start, span.stop) for span in spans])
            output = self._forward(spans, np.arange(len(places)))
            rows |= {int(place): output.logits(i) for i, place in enumerate(places)}
        logits = np.stack([rows[place] for place in range(len(rows))])
        own = [logits[start : start + size + steps] for start, size in zip(offsets, prompts, strict=False)]
        behind = np.stack([each[size:] for each, size in zip(own, prompts, strict=True)], axis=1)
        return np.concatenate([each[:size] for each, size in zip(own, prompts, strict=True)]), behind

    def _mixtures(self, size: int, steps: int) -> Iterator[list[Span]]:
        """What each step takes until every sequence has its prompt and `steps` tokens: chunks, and single tokens."""
        free_rows, first = min(self._limits.tokens, self._limits.logits), 0
        while any(sequence.length < sequence.prompt + steps for sequence in self._sequences):
            spans: list[Span] = []
            free, count = free_rows, len(self._sequences)
            for number in ((first + i) % count for i in range(count)):
                sequence = self._sequences[number]
                left = sequence.prompt - sequence.length
                wanted = min(size, left) if left > 0 else min(1, left + steps)
                taken = self._taken(sequence, wanted, free)
                if taken > 0 and len(spans) < self._limits.sequences:
                    spans.append(Span(number, sequence.length, sequence.length + taken))
                    free -= taken
            first += 1
            if not spans:
                raise RequestError(f"an image of parity has more tokens than a step: {free_rows}")
            yield spans

    def _chunks(self, size: int) -> Iterator[list[Span]]:
        """What each step of the prefill takes, until nothing is left."""
        while True:
            spans: list[Span] = []
            free = self._limits.tokens
            for number, sequence in enumerate(self._sequences):
                count = self._taken(sequence, min(size, sequence.prompt - sequence.length), free)
                if count > 0 and len(spans) < self._limits.sequences:
                    spans.append(Span(number, sequence.length, sequence.length + count))
                    free -= count
            if not spans:
                if any(sequence.length < sequence.prompt for sequence in self._sequences):
                    raise RequestError(f"an image of parity has more tokens than a step: {self._limits.tokens}")
                return
            yield spans

    def _taken(self, sequence: BatchSequence, wanted: int, free: int) -> int:
        """How many tokens come next: `wanted`, or what is `free`, but a whole image where its tokens see each other."""
        count = min(wanted, free)
        if self._whole_images and (run := sequence.runs.around(sequence.length + count)):
            start, end = run
            count = (end if end - sequence.length <= free else start) - sequence.length
        return count

    def _row_copies(self, spans: list[Span], back: bool) -> tuple[tuple[int, int], ...]:
        """Copies of the recurrent states that these tokens begin with: to spare rows, or back from there."""
        rows = [span.number + 1 for span in spans if self._recurrent and span.start > 0]
        pairs = [(row, row + len(self._sequences)) for row in rows]
        return tuple((spare, row) if back else (row, spare) for row, spare in pairs)

    def _forward(
        self, spans: list[Span], logits_index: Array, row_copies: tuple[tuple[int, int], ...] = ()
    ) -> StepOutput:
        parts = [(self._sequences[span.number], slice(span.start, span.stop)) for span in spans]
        scales = [sequence.query_scale[part] for sequence, part in parts if sequence.query_scale is not None]
        table = np.zeros((len(spans), max(len(sequence.pages) for sequence, _ in parts)), np.int32)
        for row, (sequence, _) in zip(table, parts, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        rows = np.array([span.number + 1 for span in spans], np.int32)
        between = partial(rows_between, self._visual)
        visual_index, visual = step_features((sequence.visual_index[part], between) for sequence, part in parts)
        step = Step(
            input_ids=np.concatenate([sequence.ids[part] for sequence, part in parts]),
            visual_index=visual_index,
            rope={
                group: (
                    np.concatenate([sequence.ropes[group][0][part] for sequence, part in parts]),
                    np.concatenate([sequence.ropes[group][1][part] for sequence, part in parts]),
                )
                for group in parts[0][0].ropes
            },
            query_start=np.cumsum([0, *(span.stop - span.start for span in spans)], dtype=np.int32),
            context_len=np.array([span.start for span in spans], np.int32),
            page_table=table,
            state_row=rows,
            logits_index=logits_index.astype(np.int32),
            cleared=tuple(int(row) for row, span in zip(rows, spans, strict=True) if span.start == 0),
            row_copies=row_copies,
            visible_end=(
                np.concatenate([sequence.visible_end[part] for sequence, part in parts]) if self._whole_images else None
            ),
            query_scale=np.concatenate(scales) if scales else None,
        )
        output = self._engine.forward(step, visual)
        for sequence, part in parts:
            sequence.length = part.stop
        return output
