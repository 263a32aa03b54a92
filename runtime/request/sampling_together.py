"""The next tokens of many requests at once, where the few likeliest of each row decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moevlm.runtime.request.sampler import Sampler

_FEWEST = 4  # rows; fewer are faster one by one


def chosen_together(
    samplers: Sequence[Sampler], values: np.ndarray, ids: np.ndarray, log_sum_exp: np.ndarray
) -> list[int | None]:
    """The very tokens that each sampler would choose for its row, and None for rows that it has to look at itself.

    values: [L, C] float32 logits, falling; ids: [L, C] int32; log_sum_exp: [L] float32: see `CandidateRow`.
    """
    tokens: list[int | None] = [None] * len(samplers)
    if len(samplers) < _FEWEST:
        return tokens
    usable = (np.isfinite(log_sum_exp) & np.isfinite(values[:, 0])).tolist()
    rows = [i for i, sampler in enumerate(samplers) if 0 < sampler.narrow_k < values.shape[1] and usable[i]]
    if len(rows) < _FEWEST:
        return tokens
    chosen = [samplers[i] for i in rows]
    count = np.array([sampler.narrow_k for sampler in chosen])
    columns = int(count.max())
    scores = values[rows, : columns + 1]
    each = np.arange(len(rows))
    # Where the next score is the same, more tokens than top_k may be drawn.
    certain = (scores[each, count - 1] > scores[each, count]).tolist()
    temperature = np.array([sampler.params.temperature for sampler in chosen], np.float32)
    with np.errstate(over="ignore"):
        weight = np.exp((scores[:, :columns] - scores[:, :1]) / temperature[:, None])
    weight[np.arange(columns) >= count[:, None]] = 0
    mass = np.cumsum(weight, axis=1, dtype=np.float64)
    top_p = np.array([sampler.params.top_p for sampler in chosen])
    keep = np.where(top_p < 1, 1 + (mass < (top_p * mass[:, -1])[:, None]).sum(axis=1), count)
    places = np.array([sampler.place for sampler in chosen])
    at = np.minimum((mass <= (places * mass[each, keep - 1])[:, None]).sum(axis=1), keep - 1)
    for i, one, token in zip(rows, certain, ids[rows, at].tolist(), strict=True):
        tokens[i] = token if one else None
    return tokens
