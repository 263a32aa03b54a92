"""The likeliest tokens of a row of logits."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from bench.gpu.cases.base import Arrays, Case, Cases, deviation
from moevlm.plugins.gpu.ops.candidates import CandidatesOp
from moevlm.plugins.ops.candidates import candidates

VOCABULARIES = (1, 100, 257, 32_000, 151_936)
DISTINCT = 3000  # values among the logits: most of a large row have equals


class CandidatesCases(Cases):
    """See `Cases`. A call is its number of rows."""

    kind, step = CandidatesOp, 2
    sizes = (1, 5, 64)

    def every_op(self) -> list[CandidatesOp]:
        return [CandidatesOp(vocabulary) for vocabulary in VOCABULARIES]

    def describe(self, op: CandidatesOp) -> str:
        return f"candidates {op.columns} of {op.vocabulary}"

    def case(self, op: CandidatesOp, call: int, seed: int) -> Case:
        random = np.random.default_rng(seed)
        values = (4 * random.standard_normal(DISTINCT)).astype(np.float32)
        logits = values[random.integers(0, DISTINCT, (call, op.vocabulary))]
        if call > 1:
            logits[1, -1] = np.nan
        return Case([torch.from_numpy(logits)], _held(candidates(logits, op.columns)))


def _held(expected: Sequence[np.ndarray]) -> Callable[[Arrays], float]:
    def deviation_of(found: Arrays) -> float:
        """Of the logarithms alone: what is chosen, and in which order, leaves no room for rounding."""
        for name, ours, theirs in zip(("values", "ids"), found, expected, strict=False):
            wrong = (ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs))
            if wrong.any():
                row, place = (int(places[0]) for places in np.nonzero(wrong))
                what = f"{ours[row, place]:g} (the spec: {theirs[row, place]:g})"
                raise ValueError(f"{name} of row {row} at {place}: {what}")
        found_sums, sums = found[2], expected[2].astype(np.float64)
        if (np.isnan(found_sums) != np.isnan(sums)).any():
            raise ValueError(f"log_sum_exp {found_sums.tolist()} (the spec: {sums.tolist()})")
        numbers = ~np.isnan(sums)
        return deviation(found_sums[numbers], sums[numbers])

    return deviation_of
