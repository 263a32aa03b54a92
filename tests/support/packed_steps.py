"""Text in an engine's pages, step by step: any mixture of sequences, pages in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.step import Step, StepOutput
from moevlm.runtime.request.positions import query_scales, rope_tables


@dataclass
class Kept:
    """Sequences of one engine. lengths: tokens that went through it. pages: of each sequence, in order."""

    engine: Engine
    model: ModelMetadata
    lengths: list[int]
    pages: list[list[int]]

    def step(self, ids: Mapping[int, Sequence[int]]) -> Step:
        """More tokens of some of the sequences; logits of each of them."""
        past = [self.lengths[n] for n in ids]
        places = np.concatenate([np.arange(p, p + len(part)) for p, part in zip(past, ids.values(), strict=True)])
        tokens = np.concatenate([np.array(part, np.int64) for part in ids.values()])
        positions = np.broadcast_to(places, (3, len(places)))
        return Step(
            input_ids=tokens,
            visual_index=np.full_like(tokens, -1),
            rope={str(group): rope_tables(positions, rope) for group, rope in enumerate(self.model.ropes)},
            query_start=np.cumsum([0, *map(len, ids.values())], dtype=np.int32),
            context_len=np.array(past, np.int32),
            page_table=np.array([self.pages[n] for n in ids], np.int32),
            state_row=np.array([n + 1 for n in ids], np.int32),
            logits_index=np.arange(len(tokens), dtype=np.int32),
            query_scale=None if self.model.query_scale is None else query_scales(places, self.model.query_scale),
        )

    def run(self, ids: Mapping[int, Sequence[int]] | Sequence[int]) -> np.ndarray:
        """Logits of every token of one more step, [T, vocabulary]. A list is of sequence 0."""
        chosen = ids if isinstance(ids, Mapping) else {0: ids}
        step = self.step(chosen)
        found = rows(self.engine.forward(step), step.tokens)
        for n, tokens in chosen.items():
            self.lengths[n] += len(tokens)
        return found


def reserved(engine: Engine, model: ModelMetadata, sequences: int = 1, tokens: int = 192, seed: int = 7) -> Kept:
    """A new pool for so many sequences of so many tokens. seed: of the order of pages.

    On engines for one sequence a step each has one page.
    """
    each = -(-tokens // engine.limits.page_size)
    numbers = np.random.default_rng(seed).permutation(np.arange(1, sequences * each + 1))
    engine.reserve(1 + sequences * each, 1 + sequences)
    return Kept(engine, model, [0] * sequences, numbers.reshape(sequences, each).tolist())


def rows(output: StepOutput, count: int) -> np.ndarray:
    """The logits of the first so many rows, [count, vocabulary]."""
    return np.stack([output.logits(i) for i in range(count)])
