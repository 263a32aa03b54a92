"""What a row's likeliest tokens alone decide about the next token, exactly; nothing where they cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from moevlm.runtime.request.sampling import SamplingParams

# Relative error of the mass that log_sum_exp stands for, beside its own rounding to float32: engines sum a row's
# exponentials in any order and with a fast exp.
_MASS_ERROR = 2e-6
_FLOAT32 = float(np.finfo(np.float32).eps)


class CandidateRow(msgspec.Struct, frozen=True, eq=False):
    """The likeliest tokens of one row, and the row itself for whoever needs it.

    values: [C] float32 logits, falling. ids: [C] int32, of equal logits the lower first. log_sum_exp: of the whole
    row. logits: makes the row, [vocabulary] float32.
    """

    values: np.ndarray
    ids: np.ndarray
    log_sum_exp: float
    vocabulary: int
    logits: Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class Choice:
    """The beginning of a row's distribution, the likeliest first.

    ids: [n] int32. weight: [n] float32, of which the largest is 1. The mass of all other tokens lies between low and
    high; both are 0 where these n are all that may be drawn.
    """

    ids: np.ndarray
    weight: np.ndarray
    low: float = 0.0
    high: float = 0.0

    def draw(self, at: float) -> int | None:
        """The token at a place in the distribution, 0 <= at < 1; None if the bounds do not tell."""
        cumulative = np.cumsum(self.weight, dtype=np.float64)
        total = cumulative[-1]
        first, last = np.searchsorted(cumulative, (at * (total + self.low), at * (total + self.high)), side="right")
        if self.high == 0:
            first = last = min(first, len(self.ids) - 1)
        return int(self.ids[first]) if first == last < len(self.ids) else None


class _Ranked:
    """Candidates after the repetition penalty, the likeliest first, as far as their order is certain.

    scores: [n] float32. No other token has more than `floor`; a candidate has, or it comes before all others of that
    score. hidden: how many seen tokens are among the others, at most. dropped: candidates that the penalty put there.
    """

    def __init__(self, row: CandidateRow, penalty: float, seen: np.ndarray | None) -> None:
        self.ids, self.scores = row.ids, row.values
        self.whole = len(row.ids) == row.vocabulary
        self.floor = -math.inf if self.whole else float(row.values[-1])
        self.hidden = 0
        self.dropped = row.values[:0]
        if seen is None:
            return
        known = seen[row.ids]
        self.hidden = int(np.count_nonzero(seen)) - int(np.count_nonzero(known))
        scores = row.values.copy()
        scores[known] = np.where(scores[known] < 0, scores[known] * penalty, scores[known] / penalty)
        certain = scores > self.floor
        order = np.lexsort((row.ids, -scores))
        order = order[certain[order]]
        self.ids, self.scores, self.dropped = row.ids[order], scores[order], scores[~certain]

    def tail(self, row: CandidateRow, temperature: float) -> tuple[float, float]:
        """Bounds of the others' mass at a temperature, in units of the likeliest token's."""
        if self.whole:
            return 0.0, 0.0
        best, raw = float(self.scores[0]), float(row.values[0])
        if raw - best > 300:
            return 0.0, math.inf  # the penalty left nothing of what log_sum_exp measures
        unit = math.exp(raw - best)
        known = float(np.exp(row.values - raw).sum(dtype=np.float64)) * unit
        total = math.exp(row.log_sum_exp - raw) * unit
        slack = total * (_MASS_ERROR + _FLOAT32 * max(1.0, abs(row.log_sum_exp)))
        most, count = max(total - known + slack, 0.0), row.vocabulary - len(row.ids)
        # No other token has more than exp(ceiling) at a temperature of 1. Far below the likeliest that is less than
        # float64 holds, and at a high temperature it is not.
        ceiling = min(self.floor - best, 0.0)
        # A seen token among the others lost a part that is not known; the penalty may have left nothing of it.
        least = max(total - known - slack - self.hidden * math.exp(ceiling), 0.0)
        low, high = _at_temperature(least, most, count, ceiling, temperature)
        mine = float(np.exp((self.dropped.astype(np.float64) - best) / temperature).sum())
        return low + mine, high + mine


def choose(row: CandidateRow, params: SamplingParams, seen: np.ndarray | None) -> Choice | None:
    """The distribution after penalty, temperature, top_k, top_p and min_p, as `distribution.weights` makes it.

    seen: [vocabulary] bool, which tokens the repetition penalty falls on; None without one. The temperature is not 0.
    Returns None where the row itself has to be looked at.
    """
    if seen is not None and params.repetition_penalty < 1:
        return None  # any token may rise
    ranked = _Ranked(row, params.repetition_penalty, seen)
    scores, ids = ranked.scores, ranked.ids
    if not len(ids):
        return None
    temperature = max(params.temperature, 1e-30)
    best, limit = scores[0], -math.inf
    if 0 < params.top_k < row.vocabulary:
        if params.top_k > len(scores):
            return None
        limit = float(scores[params.top_k - 1])
    if params.min_p > 0 and params.top_p == 1:
        limit = max(limit, float(best + temperature * math.log(params.min_p)))
    cut = limit > ranked.floor  # strictly: others may have the floor's score, too
    if limit > -math.inf:
        if not cut:
            return None
        count = int(np.count_nonzero(scores >= limit))
        scores, ids = scores[:count], ids[:count]
    with np.errstate(over="ignore"):
        weight = np.exp((scores - best) / np.float32(temperature))
    low, high = (0.0, 0.0) if cut else ranked.tail(row, temperature)
    if params.top_p == 1:
        return Choice(ids, weight, low, high)
    keep = _nucleus(weight, params.top_p, low, high)
    if keep is None:
        return None
    if params.min_p > 0:
        keep = min(keep, int(np.count_nonzero(weight >= params.min_p)))
    return Choice(ids[:keep], weight[:keep])


def greedy(row: CandidateRow, penalty: float, seen: np.ndarray | None) -> int | None:
    """The likeliest token, of equal ones the lowest; None where the row itself has to be looked at."""
    if seen is None:
        return int(row.ids[0])
    if penalty < 1:
        return None
    ranked = _Ranked(row, penalty, seen)
    return int(ranked.ids[0]) if len(ranked.ids) else None


def _at_temperature(least: float, most: float, count: int, ceiling: float, temperature: float) -> tuple[float, float]:
    """Bounds of sum(z ** (1 / T)) of `count` numbers z <= exp(ceiling) whose sum lies between least and most.

    The power is convex where T < 1 and concave where T > 1: so the sum is at one bound where all z are equal, and at
    the other where as many as possible are the largest.
    """
    if temperature == 1:
        return least, most
    power = 1 / temperature

    def equal(mass: float) -> float:
        return math.exp(power * math.log(mass / count)) * count if mass > 0 else 0.0

    def few(mass: float) -> float:
        return math.exp((power - 1) * ceiling + math.log(mass)) if mass > 0 else 0.0

    if temperature < 1:
        return equal(least), few(most)
    return few(least), min(equal(most), count * math.exp(power * ceiling))


def _nucleus(weight: np.ndarray, top_p: float, low: float, high: float) -> int | None:
    """How many of the likeliest hold top_p of the mass; None if that depends on where the mass of the others lies."""
    cumulative = np.cumsum(weight, dtype=np.float64)
    if high == 0:
        return 1 + int(np.count_nonzero(cumulative[:-1] < top_p * cumulative[-1]))
    least, most = top_p * (cumulative[-1] + low), top_p * (cumulative[-1] + high)
    if cumulative[-1] < most:
        return None
    first, last = np.searchsorted(cumulative, (least, most), side="left")
    return 1 + int(first) if first == last else None
