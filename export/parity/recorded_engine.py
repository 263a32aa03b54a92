"""Keeps inputs and outputs of an engine's decoder, token by token, while parity's prompts run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moevlm.export.parity.taps import Tapped
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Cache, Engine, Step, VisionInputs, VisualFeatures

Array = np.ndarray
LOGITS_KEPT = 8  # rows at each end of a step's: there kernels differ, and all of them are many
LOGITS_OF_A_CACHE = 32  # rows; a row is as long as the vocabulary


@dataclass(frozen=True)
class Sequence:
    """values: by name [S, ...], S tokens: fields of `Step`, and taps. visual: what visual_index points into, if any.

    logits: {place: row [vocabulary]}, some of them.
    """

    values: Mapping[str, Array]
    visual: VisualFeatures | None
    logits: Mapping[int, Array]


@dataclass
class RecordedCache:
    """The engine's cache, and buffers as large for all that is kept: a step writes into the same places.

    lengths: [B], how far sequences reach: the last token whose logits were wanted. What a step wrote behind it, the
    padding of shorter sequences, is no token.
    """

    inner: Cache
    lengths: Array
    values: dict[str, Array] = field(default_factory=dict)
    visual: VisualFeatures | None = None
    logits: list[dict[int, Array]] = field(default_factory=list)

    @property
    def batch(self) -> int:
        return self.inner.batch

    @property
    def capacity(self) -> int:
        return self.inner.capacity

    def keep(self, step: Step, visual: VisualFeatures | None, taps: Mapping[str, Array], logits: Array) -> None:
        """taps: rows [B * S, ...]."""
        shape = step.input_ids.shape
        given = {name: getattr(step, name) for name in ("input_ids", "visual_index", "rope_cos", "rope_sin")}
        shown = {name: tap.reshape(*shape, *tap.shape[1:]) for name, tap in taps.items() if name != "logits"}
        for name, values in (given | shown).items():
            if name not in self.values:
                self.values[name] = np.zeros((self.batch, self.capacity, *values.shape[2:]), values.dtype)
            for b, start in enumerate(step.cache_position):
                self.values[name][b, start : start + shape[1]] = values[b]
        self.visual = visual or self.visual
        kept = sum(map(len, self.logits))
        rows = sorted({*range(len(logits))[:LOGITS_KEPT], *range(len(logits))[-LOGITS_KEPT:]})
        for i in rows[: LOGITS_OF_A_CACHE - kept]:
            b, s = divmod(int(step.logits_index[i]), shape[1])
            self.logits[b][int(step.cache_position[b]) + s] = logits[i]
        ends = step.cache_position[step.logits_index // shape[1]] + step.logits_index % shape[1] + 1
        np.maximum.at(self.lengths, step.logits_index // shape[1], ends)

    def sequences(self) -> list[Sequence]:
        """One per row, up to its length."""
        return [
            Sequence({name: values[b, :length] for name, values in self.values.items()}, self.visual, self.logits[b])
            for b, length in enumerate(self.lengths)
        ]


class RecordedEngine:
    """An engine of which is kept what every step was given, what came out and, if it has taps, what they showed.

    caches: all that were made.
    """

    def __init__(self, engine: Engine | Tapped) -> None:
        self._engine = engine
        self.caches: list[RecordedCache] = []

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> VisualFeatures:
        return self._engine.encode(inputs, cancellation)

    def new_cache(self, batch: int, capacity: int) -> RecordedCache:
        inner = self._engine.new_cache(batch, capacity)
        self.caches.append(RecordedCache(inner, np.zeros(batch, np.int64), logits=[{} for _ in range(batch)]))
        return self.caches[-1]

    def forward(
        self, step: Step, visual: VisualFeatures | None, cache: RecordedCache, cancellation: Cancellation | None = None
    ) -> Array:
        logits = self._engine.forward(step, visual, cache.inner, cancellation)
        cache.keep(step, visual, getattr(self._engine, "taps", {}), logits)
        return logits

    def sequences(self) -> list[Sequence]:
        """All sequences of all caches, in order."""
        return [sequence for cache in self.caches for sequence in cache.sequences()]

    def close(self) -> None:
        """Nothing to do: who loaded the engine closes it."""
