"""The prompts of parity in an engine that has room for so many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from moevlm.export.tolerances import DECODE_STEPS
from moevlm.runtime.batch import Batch, cache_capacity
from moevlm.runtime.engine import Engine, VisualFeatures
from moevlm.runtime.errors import RequestError
from moevlm.runtime.manifest import ModelFacts, TensorRTFacts
from moevlm.runtime.prompt import Prompt


@dataclass(frozen=True)
class Room:
    """batch: prompts stepped together. chunk_tokens: of each in a step. capacity: tokens in a cache.

    steps: decode steps behind the longest prompt, DECODE_STEPS where the cache has room for them.
    """

    batch: int
    chunk_tokens: int
    capacity: int
    steps: int

    @classmethod
    def of(cls, prompts: Sequence[Prompt], context: int, limits: TensorRTFacts | None) -> Self:
        """limits: None for an engine without. Raises RequestError if not one step behind a prompt fits."""
        longest = max(len(prompt.ids) for prompt in prompts)
        batch, chunk_tokens, capacity = len(prompts), longest, cache_capacity(longest + DECODE_STEPS, context)
        if limits is not None:
            batch = min(batch, limits.max_batch, limits.max_visual)
            chunk_tokens = min(chunk_tokens, limits.chunk_tokens, limits.max_visual // batch)
            capacity = min(capacity, limits.capacity)
        if longest >= capacity:
            raise RequestError(f"parity needs a cache of {longest + 1} tokens, the engine has {capacity}")
        return cls(batch, chunk_tokens, capacity, min(DECODE_STEPS, capacity - longest))


class Batches:
    """Prompts in new caches, `room.batch` of them at a time; results are those of all, in order."""

    def __init__(
        self, engine: Engine, model: ModelFacts, prompts: Sequence[Prompt], visual: VisualFeatures | None, room: Room
    ) -> None:
        """visual: features of the images of all prompts, in order; None if there are none."""
        self._room = room
        self._batches, seen = [], 0
        for start in range(0, len(prompts), room.batch):
            group = prompts[start : start + room.batch]
            rows = slice(seen, seen + sum(prompt.image_tokens for prompt in group))
            part = None if visual is None else VisualFeatures(visual.embeds[rows], visual.deepstack[:, rows])
            self._batches.append(Batch(engine, model, group, part, room.capacity))
            seen = rows.stop

    def prefill(self, chunk_tokens: int | None = None, every_position: bool = False) -> np.ndarray:
        """As `Batch.prefill`, in smaller chunks where the engine takes no larger ones."""
        size = min(chunk_tokens or self._room.chunk_tokens, self._room.chunk_tokens)
        return np.concatenate([batch.prefill(size, every_position) for batch in self._batches])

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """As `Batch.decode`."""
        starts = range(0, len(tokens), self._room.batch)
        groups = [tokens[start : start + self._room.batch] for start in starts]
        return np.concatenate([batch.decode(group) for batch, group in zip(self._batches, groups, strict=True)])
