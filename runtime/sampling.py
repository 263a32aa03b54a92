"""From logits to the next token: validated parameters, and one random stream for each request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.runtime.errors import EngineError, RequestError

MAX_TOKENS = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
_FIRST_NUCLEUS = 256  # candidates looked at first for top_p


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Raises RequestError that names the field, its value and what is allowed.

    temperature: 0 is greedy, and then top_k, top_p, min_p and seed have no effect. top_k: 0 is off. top_p: 1 is off.
    min_p: 0 is off. repetition_penalty: 1 is off; it counts the prompt's tokens too, as Hugging Face does.
    seed: None draws a fresh one. stop: the text ends before whichever of these strings is complete first.
    logprobs: None for none at all, else how many alternatives to report beside each chosen token.
    ignore_eos: go on until max_new_tokens, for benchmarks.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._whole("max_new_tokens", 1, MAX_TOKENS)
        self._number("temperature", 0, 100)
        self._whole("top_k", 0, MAX_TOKENS)
        self._number("top_p", 0, 1, open_low=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0, 100, open_low=True)
        if self.seed is not None:
            self._whole("seed", 0, 2**63 - 1)
        if self.logprobs is not None:
            self._whole("logprobs", 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            self._refuse("ignore_eos", "true or false")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or len(stop) > MAX_STOPS:
            self._refuse("stop", f"at most {MAX_STOPS} strings")
        if not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARACTERS for text in stop):
            self._refuse("stop", f"strings of 1 to {MAX_STOP_CHARACTERS} characters")
        object.__setattr__(self, "stop", tuple(stop))

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
        value = repr(getattr(self, name))
        shown = value if len(value) <= 60 else value[:57] + "..."
        raise RequestError(f"unsupported value {name} = {shown} (allowed: {allowed})")


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

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = np.random.default_rng(params.seed)

    def sample(self, logits: np.ndarray, history: np.ndarray | Sequence[int] = ()) -> Sampled:
        """Choose the next token.

        logits: [vocabulary] float32. history: [S] integer, the prompt and what was generated (for the penalty only).
        Raises EngineError for logits that have no largest finite value: they can only come from a broken engine.
        """
        params = self.params
        scores = _penalize(logits, history, params.repetition_penalty)
        best = int(scores.argmax())  # a NaN counts as the largest
        if not math.isfinite(scores[best]):
            raise EngineError(f"the decoder's logits are not usable: logit of token {best} is {scores[best]}")
        token = best if params.temperature == 0 else self._draw(scores)
        if params.logprobs is None:
            return Sampled(token)
        return _with_logprobs(token, logits, params.logprobs)

    def _draw(self, scores: np.ndarray) -> int:
        candidates, probability = distribution(scores, self.params)
        total = np.cumsum(probability)
        at = int(np.searchsorted(total, self._random.random() * total[-1], side="right"))
        return int(candidates[min(at, len(candidates) - 1)])


def distribution(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """What is left after temperature, top_k, top_p and min_p, in the order of Hugging Face's logits warpers.

    scores: [vocabulary] float32, after the repetition penalty; temperature must not be 0.
    Returns (token ids [n] int64, ascending; probabilities [n] float64, which sum to 1).
    """
    # Temperature keeps the order, so top_k can come first: then only its survivors need float64 and a softmax.
    k = params.top_k
    if 0 < k < len(scores):
        # Ties with the k-th largest stay, as in Hugging Face.
        candidates = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    else:
        candidates = np.arange(len(scores))
    kept = scores[candidates].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is the right limit
        probability = np.exp((kept - kept.max()) / params.temperature)
    probability /= probability.sum()
    if params.top_p < 1:
        nucleus = _nucleus(probability, params.top_p)
        candidates, probability = candidates[nucleus], probability[nucleus]
    if params.min_p > 0:
        likely = probability >= params.min_p * probability.max()
        candidates, probability = candidates[likely], probability[likely]
    return candidates, probability / probability.sum()


def _nucleus(probability: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the fewest likeliest entries that hold top_p of the mass; at least one.

    An entry stays while the likelier ones hold less than top_p. Entries outside the n likeliest need no look once
    these n hold top_p, so a peaked distribution over a large vocabulary is never sorted as a whole.
    """
    count = _FIRST_NUCLEUS
    while True:
        if count >= len(probability):
            front = np.arange(len(probability))
        else:
            front = np.argpartition(probability, -count)[-count:]
        front = front[np.argsort(-probability[front], kind="stable")]
        cumulative = np.cumsum(probability[front])
        if count >= len(probability) or cumulative[-1] >= top_p:
            keep = 1 + int(np.count_nonzero(cumulative[:-1] < top_p))
            return np.sort(front[:keep])
        count *= 16


def _penalize(logits: np.ndarray, history: np.ndarray | Sequence[int], penalty: float) -> np.ndarray:
    """Divide positive logits of seen tokens by `penalty` and multiply negative ones (CTRL, section 4.1)."""
    if penalty == 1 or len(history) == 0:
        return logits
    seen = np.asarray(history, dtype=np.int64)
    scores = logits.copy()
    # Read from the untouched logits: a token that was seen twice is penalized once.
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
