"""The likeliest tokens of rows of logits, for engines whose graph does not find them."""

from __future__ import annotations

import math

import numpy as np

from moevlm.runtime.engine.step import Candidates

_PARTS = 4  # for each value that is looked for


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
    size = max(len(row) // (_PARTS * count), 1)
    whole = len(row) // size * size
    # Of so many parts' largest values the count-th is no larger than the row's: few others are as large.
    parts = row[:whole].reshape(-1, size).max(axis=1)
    least = np.partition(parts, len(parts) - count)[len(parts) - count]
    places = np.flatnonzero(row >= least)
    return places[np.lexsort((places, -row[places]))][:count]
