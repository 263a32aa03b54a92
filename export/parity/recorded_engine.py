"""Keeps inputs and outputs of an engine's decoder, token by token, while parity's prompts run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moevlm.export.parity.wrapped_engine import WrappedEngine
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.step import Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, joined

Array = np.ndarray
LOGITS_KEPT = 8  # rows at each end of a step's: there kernels differ, and all of them are many
LOGITS_OF_A_POOL = 32  # rows; a row is as long as the vocabulary


@dataclass(frozen=True)
class RecordedSequence:
    """values: by name [S, ...], S tokens: inputs of the graph, and debug outputs. visual: what visual_index points
    into, if any. logits: {place: row [vocabulary]}, some of them.
    """

    values: Mapping[str, Array]
    visual: HostFeatures | None
    logits: Mapping[int, Array]


@dataclass
class _Kept:
    """Of one sequence: parts of its values, step after step."""

    parts: dict[str, list[Array]] = field(default_factory=dict)
    visual: list[HostFeatures] = field(default_factory=list)
    logits: dict[int, Array] = field(default_factory=dict)

    def see(self, index: Array, features: HostFeatures) -> Array:
        """Keep the rows of a step's features that `index` [S] names, -1 for none. Returns where they are kept."""
        images = index >= 0
        first = sum(one.rows for one in self.visual)
        self.visual.append(HostFeatures(features.embeds[index[images]], features.deepstack[:, index[images]]))
        return np.where(images, first + np.cumsum(images) - 1, -1)

    def sequence(self) -> RecordedSequence:
        for name, parts in self.parts.items():
            self.parts[name] = [np.concatenate(parts)]  # in place of the parts: memory for one name at a time
        visual = joined([FeatureRows.all_of(one) for one in self.visual]) if self.visual else None
        return RecordedSequence({name: part for name, (part,) in self.parts.items()}, visual, self.logits)


class RecordedEngine(WrappedEngine):
    """An engine of which is kept what every step was given, what came out and, if it has any, its debug outputs.

    A sequence is known by its state row, from one `reserve` to the next.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._pools: list[dict[int, _Kept]] = []

    def reserve(self, pages: int, rows: int) -> None:
        super().reserve(pages, rows)
        self._pools.append({})

    def forward(
        self, step: Step, visual: Sequence[FeatureRows] = (), cancellation: Cancellation | None = None
    ) -> StepOutput:
        output = super().forward(step, visual, cancellation)
        pool = self._pools[-1]
        features = joined(visual) if visual else None
        values = {"input_ids": step.input_ids, "visual_index": step.visual_index, **output.outputs}
        if step.visible_end is not None:
            values["visible_end"] = step.visible_end
        if step.query_scale is not None:
            values["query_scale"] = step.query_scale
        for group, (cos, sin) in step.rope.items():
            values |= {f"rope_cos.{group}": cos, f"rope_sin.{group}": sin}
        for n, row in enumerate(step.state_row.tolist()):
            kept = pool.setdefault(row, _Kept())
            own = {name: rows[step.query_start[n] : step.query_start[n + 1]].copy() for name, rows in values.items()}
            if features is not None:
                own["visual_index"] = kept.see(own["visual_index"], features)
            for name, rows in own.items():
                kept.parts.setdefault(name, []).append(rows)
        self._keep_logits(pool, step, output)
        return output

    def _keep_logits(self, pool: Mapping[int, _Kept], step: Step, output: StepOutput) -> None:
        wanted = range(len(step.logits_index))
        free = LOGITS_OF_A_POOL - sum(len(kept.logits) for kept in pool.values())
        for i in sorted({*wanted[:LOGITS_KEPT], *wanted[-LOGITS_KEPT:]})[: max(free, 0)]:
            place = int(step.logits_index[i])
            n = int(np.searchsorted(step.query_start, place, side="right")) - 1
            position = int(step.context_len[n]) + place - int(step.query_start[n])
            pool[int(step.state_row[n])].logits[position] = output.logits(i)

    def sequences(self) -> list[RecordedSequence]:
        """All sequences of all pools, in order."""
        return [kept.sequence() for pool in self._pools for _, kept in sorted(pool.items())]

    def close(self) -> None:
        """Nothing to do: who loaded the engine closes it."""
