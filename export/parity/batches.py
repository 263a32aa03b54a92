"""The prompts of parity in an engine that has room for so many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from moevlm.export.parity.tolerances import DECODE_STEPS
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.manifest import ModelMetadata, TensorRTMetadata
from moevlm.runtime.engine.batch import Batch, cache_capacity
from moevlm.runtime.engine.protocol import Engine, VisualFeatures
from moevlm.runtime.request.prompt import Prompt

PADDING = 128  # tokens that prompts of a batch may differ by


@dataclass(frozen=True)
class Room:
    """batch: prompts stepped together. chunk_tokens: of each in a step. capacity: tokens in a cache.

    steps: decode steps behind the longest prompt, as many as wanted where the cache has room for them.
    """

    batch: int
    chunk_tokens: int
    capacity: int
    steps: int

    @classmethod
    def of(
        cls, prompts: Sequence[Prompt], context: int, limits: TensorRTMetadata | None, steps: int = DECODE_STEPS
    ) -> Self:
        """limits: None for an engine without. Raises RequestError if not one step behind a prompt fits."""
        longest = max(len(prompt.ids) for prompt in prompts)
        batch, chunk_tokens, capacity = len(prompts), longest, cache_capacity(longest + steps, context)
        if limits is not None:
            batch = min(batch, limits.max_batch, limits.max_visual)
            chunk_tokens = min(chunk_tokens, limits.chunk_tokens, limits.max_visual // batch)
            capacity = min(capacity, limits.capacity)
        if longest >= capacity:
            raise RequestError(f"parity needs a cache of {longest + 1} tokens, the engine has {capacity}")
        return cls(batch, chunk_tokens, capacity, min(steps, capacity - longest))


class Batches:
    """Prompts in new caches, `room.batch` of them at a time; results are those of all, in order.

    Prompts of very different lengths are not stepped together: the short ones would be mostly padding.
    batches: what steps them.
    """

    def __init__(
        self, engine: Engine, model: ModelMetadata, prompts: Sequence[Prompt], visual: VisualFeatures | None, room: Room
    ) -> None:
        """visual: features of the images of all prompts, in order; None if there are none."""
        self._room = room
        self.batches: list[Batch] = []
        self._groups, seen = _groups(prompts, room.batch), 0
        for part_of in self._groups:
            group = prompts[part_of]
            rows = slice(seen, seen + sum(prompt.image_tokens for prompt in group))
            part = None if visual is None else VisualFeatures(visual.embeds[rows], visual.deepstack[:, rows])
            self.batches.append(Batch(engine, model, group, part, room.capacity))
            seen = rows.stop

    def prefill(self, chunk_tokens: int | None = None, every_position: bool = False) -> np.ndarray:
        """As `Batch.prefill`, in smaller chunks where the engine takes no larger ones."""
        size = min(chunk_tokens or self._room.chunk_tokens, self._room.chunk_tokens)
        return np.concatenate([batch.prefill(size, every_position) for batch in self.batches])

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """As `Batch.decode`."""
        pairs = zip(self.batches, self._groups, strict=True)
        return np.concatenate([batch.decode(tokens[group]) for batch, group in pairs])


def _groups(prompts: Sequence[Prompt], most: int) -> list[slice]:
    groups = [slice(0, 1)]
    for i, prompt in enumerate(prompts[1:], 1):
        last = groups[-1]
        if i - last.start < most and abs(len(prompt.ids) - len(prompts[last.start].ids)) <= PADDING:
            groups[-1] = slice(last.start, i + 1)
        else:
            groups.append(slice(i, i + 1))
    return groups
