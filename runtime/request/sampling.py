"""From logits to the next token: validated parameters, and one random stream for each request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import EngineError, RequestError, shown

MAX_TOKENS = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
MIN_PENALTY = 1e-3  # far below, logits leave float32
NARROWING = ("top_k", "top_p", "min_p")
_FIRST_NUCLEUS = 256  # candidates looked at first for top_p


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Raises RequestError that names the field, its value and what is allowed.

    None stands for the default of any of them. max_new_tokens: 256 by default. temperature: 0 is greedy; then top_k,
    top_p and min_p, which would have no effect, are refused. top_k: 0 is off. top_p: 1 is off.
    min_p: 0 is off. repetition_penalty: 1 is off; it counts the prompt's tokens too, as Hugging Face does.
    seed: the same one gives the same text; by default a fresh one is drawn. stop: the text ends before whichever of
    these strings is complete first; one may be a special token.
    logprobs: None for none at all, else how many alternatives to report beside each chosen token.
    skip_special_tokens: leave special tokens, such as markers of thoughts, out of the text.
    ignore_eos: go on until max_new_tokens, for benchmarks.
    """

    max_new_tokens: int = defaults.MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    skip_special_tokens: bool = True
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None:
                object.__setattr__(self, field.name, field.default)
        self._whole("max_new_tokens", 1, MAX_TOKENS)
        self._number("temperature", 0, 100)
        self._whole("top_k", 0, MAX_TOKENS)
        self._number("top_p", 0, 1, open_low=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", MIN_PENALTY, 100)
        if self.seed is not None:
            self._whole("seed", 0, 2**63 - 1)
        if self.logprobs is not None:
            self._whole("logprobs", 0, MAX_LOGPROBS)
        for name in ("skip_special_tokens", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "true or false")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or len(stop) > MAX_STOPS:
            self._refuse("stop", f"at most {MAX_STOPS} strings")
        if not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARACTERS for text in stop):
            self._refuse("stop", f"strings of 1 to {MAX_STOP_CHARACTERS} characters")
        if any("\ud800" <= char <= "\udfff" for text in stop for char in text):
            self._refuse("stop", "Unicode text: a lone surrogate never occurs")
        object.__setattr__(self, "stop", tuple(stop))
        if self.temperature == 0:
            for name in NARROWING:
                if getattr(self, name) != getattr(type(self), name):
                    self._refuse(name, "with a temperature above 0: at 0 the likeliest token is taken")

    def updated(self, options: SamplingOptions) -> SamplingParams:
        """These with other values for some options; None leaves one as it is.

        A temperature of 0 switches off what narrows the choice here, unless it is among the options, too.
        """
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if given.get("temperature") == 0:
            given = {name: getattr(type(self), name) for name in NARROWING} | given
        return dataclasses.replace(self, **given)

    def _whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            self._refuse(name, f"a whole number from {low} to {high}")
        object.__setattr__(self, name, int(value))

    def _number(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        good = not isinstance(value, bool) and isinstance(value, (int, float, np.integer, np.floating))
        # Written so that NaN fails.
        if not (good and low <= value <= high and not (open_low and value == low)):
            self._refuse(name, f"a number above {low}, up to {high}" if open_low else f"a number from {low} to {high}")
        object.__setattr__(self, name, float(value))

    def _refuse(self, name: str, allowed: str) -> None:
        raise RequestError(f"unsupported value {name} = {shown(getattr(self, name))} (allowed: {allowed})")


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments; None is as good as absent."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    skip_special_tokens: bool | None
    ignore_eos: bool | None


@dataclass(frozen=True)
class Sampled:
    """A chosen token. logprob and top ((token_id, logprob), likeliest first) are empty unless logprobs were asked for.

    They are of the model's own distribution: log_softmax of the raw logits, before penalty, temperature and filters.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one request. The same seed and the same logits give the same tokens."""

    def __init__(self, params: SamplingParams, prompt: np.ndarray | Sequence[int] = ()) -> None:
        """prompt: token ids [S], which the repetition penalty counts as seen."""
        self.params = params
        self._random = np.random.default_rng(params.seed)
        self._seen = np.unique(np.asarray(prompt, np.int64)) if params.repetition_penalty != 1 else None

    def sample(self, logits: np.ndarray) -> Sampled:
        """Choose the next token.

        logits: [vocabulary] float32.
        Raises EngineError for logits that have no largest finite value: they can only come from a broken engine.
        """
        params = self.params
        scores = logits if self._seen is None else penalize(logits, self._seen, params.repetition_penalty)
        best = int(scores.argmax())  # a NaN counts as the largest
        if not math.isfinite(scores[best]):
            raise EngineError(f"the decoder's logits are not usable: logit of token {best} is {scores[best]}")
        token = best if params.temperature == 0 else self._draw(scores)
        if self._seen is not None and token not in self._seen:
            self._seen = np.append(self._seen, token)
        if params.logprobs is None:
            return Sampled(token)
        return _with_logprobs(token, logits, params.logprobs)

    def _draw(self, scores: np.ndarray) -> int:
        candidates, weight = weights(scores, self.params)
        total = np.cumsum(weight, dtype=np.float64)
        at = int(np.searchsorted(total, self._random.random() * total[-1], side="right"))
        at = min(at, len(weight) - 1)
        return at if candidates is None else int(candidates[at])


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
    """Divide positive logits of seen tokens by `penalty` and multiply negative ones (CTRL, section 4.1)."""
    scores = logits.copy()
    scores[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    return scores


def _with_logprobs(token: int, logits: np.ndarray, count: int) -> Sampled:
    shifted = logits - logits.max()
    logsum = math.log(np.exp(shifted).sum(dtype=np.float64))
    if count == 0:
        return Sampled(token, float(shifted[token]) - logsum)
    count = min(count, len(logits))
    front = np.argpartition(shifted, -count)[-count:]
    # Ties by the lower id, so that the report does not depend on the partition's internal order.
    front = front[np.lexsort((front, -shifted[front]))]
    return Sampled(token, float(shifted[token]) - logsum, tuple((int(i), float(shifted[i]) - logsum) for i in front))
