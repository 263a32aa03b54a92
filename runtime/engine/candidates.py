"""The likeliest tokens of rows of logits, for engines whose graph does not find them."""

from __future__ import annotations

import math

import numpy as np

from moevlm.runtime.engine.step import Candidates


def candidates_of(logits: np.ndarray, count: int) -> Candidates:
    """The `count` largest of each row, or all of a shorter one. logits: [L, vocabulary] float32.

    A row without a largest finite value has what it has instead as every value and as log_sum_exp.
    """
    rows, count = len(logits), min(count, logits.shape[1])
    values, ids = np.empty((rows, count), np.float32), np.empty((rows, count), np.int32)
    log_sum_exp = np.empty(rows, np.float32)
    for i, row in enumerate(logits):
        top = float(row.max())
        if not math.isfinite(top):
            values[i], ids[i], log_sum_exp[i] = top, np.arange(count), top
            continue
        ids[i] = _largest(row, count)
        values[i] = row[ids[i]]
        log_sum_exp[i] = top + math.log(np.exp(row - np.float32(top)).sum(dtype=np.float64))
    return Candidates(values, ids, log_sum_exp)


def _largest(row: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest values are, the largest first; of equal ones the lower place first."""
    least = np.partition(row, len(row) - count)[len(row) - count]
    above = np.flatnonzero(row > least)
    places = np.concatenate([above, np.flatnonzero(row == least)[: count - len(above)]])
    return places[np.lexsort((places, -row[places]))]
