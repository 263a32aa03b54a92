"""A whole row of logits as a distribution to draw from: repetition penalty, temperature, top_k, top_p and min_p."""

from __future__ import annotations

import math

import numpy as np

from moevlm.runtime.request.sampling import SamplingParams

CANDIDATES = 256  # tokens that an engine tells of each row, as far as the vocabulary has them
_FIRST_NUCLEUS = 256  # entries looked at first for top_p


def weights(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """What is left after temperature, top_k, top_p and min_p, in the order of Hugging Face's logits warpers.

    scores: [vocabulary] float32, after the repetition penalty; temperature must not be 0.
    Returns (token ids [n] int64, ascending, or None for all; probabilities [n] float32, of which the largest is 1).
    """
    # Below float32's range a temperature leaves the largest alone, as 1e-30 does.
    temperature = max(params.temperature, 1e-30)
    # Temperature keeps the order, so top_k can come first; min_p is relative to the likeliest, which top_k keeps.
    limit = -np.inf
    if 0 < params.top_k < len(scores):
        # Ties with the k-th largest stay, as in Hugging Face.
        limit = np.partition(scores, -params.top_k)[-params.top_k]
    best = scores.max()
    if params.min_p > 0 and params.top_p == 1:
        limit = max(limit, best + temperature * math.log(params.min_p))
    candidates = None
    if limit > -np.inf:
        candidates = np.flatnonzero(scores >= limit)
        scores = scores[candidates]
    weight = scores - best
    with np.errstate(over="ignore"):  # -inf is the right limit
        weight /= temperature
    np.exp(weight, out=weight)
    if params.top_p < 1:
        kept = _nucleus(weight, params.top_p)
        if params.min_p > 0:
            kept = kept[weight[kept] >= params.min_p]
        candidates = kept if candidates is None else candidates[kept]
        weight = weight[kept]
    return candidates, weight


def _nucleus(weight: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the fewest likeliest entries that hold top_p of the mass; at least one.

    An entry stays while the likelier ones hold less than top_p. Entries outside the n likeliest need no look once
    these n hold top_p, so a peaked distribution over a large vocabulary is never sorted as a whole.
    """
    needed = top_p * float(weight.sum(dtype=np.float64))
    count = _FIRST_NUCLEUS
    while True:
        # Values alone: sorting indices costs ten times as much.
        front = weight if count >= len(weight) else np.partition(weight, -count)[-count:]
        front = np.sort(front)[::-1]
        cumulative = np.cumsum(front, dtype=np.float64)
        if count >= len(weight) or cumulative[-1] >= needed:
            break
        count *= 16
    keep = 1 + int(np.count_nonzero(cumulative[:-1] < needed))
    least = front[keep - 1]
    kept = weight >= least
    if surplus := int(np.count_nonzero(kept)) - keep:
        kept[np.flatnonzero(weight == least)[-surplus:]] = False  # of equal entries the lower ids stay
    return np.flatnonzero(kept)


def penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Divide positive logits of seen tokens by `penalty` and multiply negative ones (CTRL, section 4.1).

    seen: [n] token ids, each once, or [vocabulary] bool.
    """
    scores = logits.copy()
    scores[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    return scores


def in_order(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The order in which tokens are drawn: the CANDIDATES likeliest first, falling, then the others by id.

    ids: [n], ascending. scores: [n] float32. Returns [n] int64, places in both; of equal scores the lower id first.
    """
    if len(scores) <= CANDIDATES:
        return np.lexsort((ids, -scores))
    least = np.partition(scores, -CANDIDATES)[-CANDIDATES]
    above = np.flatnonzero(scores > least)
    front = np.concatenate([above, np.flatnonzero(scores == least)[: CANDIDATES - len(above)]])
    rest = np.ones(len(scores), bool)
    rest[front] = False
    return np.concatenate([front[np.lexsort((ids[front], -scores[front]))], np.flatnonzero(rest)])
