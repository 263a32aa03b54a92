"""Candidates in numpy: a row's likeliest tokens, and what makes their logits probabilities."""

import numpy as np

Array = np.ndarray


def candidates(logits: Array, count: int) -> tuple[Array, Array, Array]:
    """The `count` largest logits of each row.

    logits: [L, V] float32; 1 <= count <= V.
    Returns (values [L, count] float32, ids [L, count] int32, log_sum_exp [L] float32): the largest value first, of
    equal ones the lower id; NaN before all others. log_sum_exp is NaN for a row with NaN or +infinity, or with nothing
    above -infinity.
    """
    ids = np.argsort(np.where(np.isnan(logits), -np.inf, -logits), axis=1, kind="stable")
    ids = np.take_along_axis(ids, np.argsort(~np.isnan(np.take_along_axis(logits, ids, 1)), axis=1, kind="stable"), 1)
    ids = ids[:, :count]
    values = np.take_along_axis(logits, ids, axis=1)
    best = values[:, :1].astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        sums = np.exp(logits - best).sum(axis=1)
    return values, ids.astype(np.int32), (best[:, 0] + np.log(sums)).astype(np.float32)
