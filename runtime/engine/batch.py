"""A batch of sequences in an engine's cache: prefill in chunks, then one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moevlm.runtime.core.errors import EngineError, RequestError
from moevlm.runtime.core.manifest import ModelMetadata, RopeMetadata
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Cache, Engine, Step, VisualFeatures
from moevlm.runtime.request.positions import rope_tables
from moevlm.runtime.request.prompt import Prompt

CAPACITY_STEP = 64
TABLE_STEP = 64  # decoding makes its rotary tables for so many tokens at a time


def cache_capacity(tokens: int, context: int) -> int:
    """Room for `tokens`, rounded up so that few different shapes are ever made, at most the context."""
    return min(-(-tokens // CAPACITY_STEP) * CAPACITY_STEP, context)


class Batch:
    """B prompts of any lengths, stepped together.

    Rows are padded on the right. Where a short prompt ends before the longest one, its padding lands behind its last
    token and is overwritten by that row's next step.
    """

    def __init__(
        self,
        engine: Engine,
        model: ModelMetadata,
        prompts: Sequence[Prompt],
        visual: VisualFeatures | None,
        capacity: int,
        cancellation: Cancellation | None = None,
    ) -> None:
        """visual: features of the images of all prompts, in order; None if there are none.

        capacity: tokens that each sequence may grow to. Raises RequestError if a prompt does not fit into it.
        cancellation: makes `prefill` and `decode` raise Cancelled, before their next step or within one.
        """
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest > capacity:
            raise RequestError(f"the prompt has {longest} tokens, the cache room for {capacity}")
        rows = sum(prompt.image_tokens for prompt in prompts)
        if rows != (0 if visual is None else len(visual.embeds)):
            raise EngineError(f"{0 if visual is None else len(visual.embeds)} visual features for {rows} image tokens")
        self._engine = engine
        self._cancellation = cancellation or Cancellation()
        self._rope = model.ropes[0]
        self._prompts = tuple(prompts)
        self._visual = visual
        self._cache: Cache | None = engine.new_cache(len(prompts), capacity)
        self._prompt_lengths = np.array([len(prompt.ids) for prompt in prompts], dtype=np.int64)
        self._next_positions = np.array([prompt.next_position for prompt in prompts], dtype=np.int64)
        self._lengths = np.zeros(len(prompts), dtype=np.int64)
        self._steps = _DecodeSteps(model.ropes[0], self._next_positions)

    @property
    def lengths(self) -> np.ndarray:
        """[B] int64, tokens of each sequence that are in the cache."""
        return self._lengths.copy()

    def prefill(self, chunk_tokens: int | None = None, every_position: bool = False) -> np.ndarray:
        """Run the prompts through the decoder, `chunk_tokens` columns at a time (None: in one pass).

        Returns logits [B, vocabulary] float32 of each prompt's last token, or, with every_position,
        [sum of prompt lengths, vocabulary], prompt after prompt.
        """
        columns = int(self._prompt_lengths.max())
        ids, visual_index, cos, sin = self._table(columns)
        offsets = np.cumsum(self._prompt_lengths) - self._prompt_lengths
        total = int(self._prompt_lengths.sum()) if every_position else len(self._prompts)
        logits: np.ndarray | None = None
        size = chunk_tokens or columns
        for start in range(0, columns, size):
            chunk = slice(start, min(start + size, columns))
            ends = np.minimum(self._prompt_lengths, chunk.stop)
            row, column = np.nonzero(np.arange(chunk.start, chunk.stop) < self._prompt_lengths[:, None])
            if every_position:
                target = offsets[row] + column + start
            else:
                last = column + start == self._prompt_lengths[row] - 1
                row, column = row[last], column[last]
                target = row
            # An engine's profile may not allow an empty axis: where nothing is wanted, one row is computed and dropped.
            index = row * (chunk.stop - start) + column if len(row) else np.zeros(1, np.int64)
            step = Step(
                input_ids=ids[:, chunk],
                visual_index=visual_index[:, chunk],
                rope_cos=cos[:, chunk],
                rope_sin=sin[:, chunk],
                cache_position=np.minimum(self._prompt_lengths, start),
                logits_index=index,
            )
            visual = self._visual if (step.visual_index >= 0).any() else None
            result = self._forward(step, visual)
            self._lengths = ends
            if len(row):
                if logits is None:
                    logits = np.empty((total, result.shape[-1]), np.float32)
                logits[target] = result
        assert logits is not None  # a prompt has at least one token
        self._visual = None
        return logits

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each sequence. Returns logits [B, vocabulary] float32 of what follows it."""
        ids = np.asarray(tokens, dtype=np.int64)[:, None]
        step = self._steps.next(ids, int(self._lengths[0] - self._prompt_lengths[0]), self._lengths)
        logits = self._forward(step, None)
        self._lengths = self._lengths + 1
        return logits

    def release(self) -> None:
        """Let go of the cache, even where a traceback still holds this object."""
        self._cache = None
        self._visual = None

    def _forward(self, step: Step, visual: VisualFeatures | None) -> np.ndarray:
        if self._cache is None:
            raise EngineError("this batch was released")
        self._cancellation.check()
        return self._engine.forward(step, visual, self._cache, self._cancellation)

    def _table(self, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Padded ids and visual_index [B, columns] int64, rope cos and sin [B, columns, R / 2] float32."""
        shape = (len(self._prompts), columns)
        ids, visual_index = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        positions = np.zeros((3, *shape), np.int64)
        seen = 0
        for b, prompt in enumerate(self._prompts):
            size = len(prompt.ids)
            ids[b, :size] = prompt.ids
            visual_index[b, :size] = np.where(prompt.visual_index < 0, -1, prompt.visual_index + seen)
            positions[:, b, :size] = prompt.positions
            seen += prompt.image_tokens
        return ids, visual_index, *rope_tables(positions, self._rope)


class _DecodeSteps:
    """Steps of one token, with what does not depend on it made for many at once: between two tokens the weights have
    pushed everything else out of the CPU's caches, and every call of numpy costs many times what it costs alone.
    """

    def __init__(self, rope: RopeMetadata, first: np.ndarray) -> None:
        """first: [B] int64, the position on every axis of the first token after the prompt."""
        self._rope, self._first = rope, first
        self._text = np.full((len(first), 1), -1, np.int64)
        self._rows = np.arange(len(first))
        self._begin = 0
        self._cos = self._sin = np.empty((len(first), 0, 0), np.float32)

    def next(self, ids: np.ndarray, token: int, lengths: np.ndarray) -> Step:
        """ids [B, 1]; token: how many were decoded before; lengths [B]: of the sequences in the cache."""
        if not self._begin <= token < self._begin + self._cos.shape[1]:
            positions = self._first[:, None] + np.arange(token, token + TABLE_STEP)
            self._begin = token
            self._cos, self._sin = rope_tables(np.broadcast_to(positions, (3, *positions.shape)), self._rope)
        column = slice(token - self._begin, token - self._begin + 1)
        return Step(ids, self._text, self._cos[:, column], self._sin[:, column], lengths, self._rows)
