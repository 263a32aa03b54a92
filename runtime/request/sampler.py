"""From logits to the next token: one random stream for each request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.request.candidates import CandidateRow, choose, greedy
from moevlm.runtime.request.distribution import in_order, penalize, weights
from moevlm.runtime.request.sampling import SamplingParams

_COLDEST = 1e-30  # below it float32 cannot divide by a temperature


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token. logprob and top ((token_id, logprob), likeliest first) are empty unless logprobs were asked for.

    They are of the model's own distribution: log_softmax of the raw logits, before penalty, temperature and filters.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one request. The same seed and the same logits give the same tokens.

    A number is drawn for each token, and stands for a place in the distribution: its likeliest tokens come first. So
    candidates give the very token that the whole row gives, and the row is asked for where they do not tell.
    """

    def __init__(self, params: SamplingParams, prompt: np.ndarray | Sequence[int] = ()) -> None:
        """prompt: token ids [S], which the repetition penalty counts as seen."""
        self.params = params
        self._plain = params.temperature == 0 and params.repetition_penalty == 1 and params.logprobs is None
        # Above 0 where a row's likeliest so many tokens are all that matters, but for a tie at their end.
        narrow = params.temperature > 0 and params.repetition_penalty == 1 and params.logprobs is None
        self.narrow_k = params.top_k if narrow and params.min_p == 0 and params.temperature > _COLDEST else 0
        self._random = np.random.default_rng(params.seed)
        self._place: float | None = None
        self._prompt = np.asarray(prompt, np.int64)
        self._seen: np.ndarray | None = None  # [vocabulary] bool, for a repetition penalty

    @property
    def place(self) -> float:
        """Where in the distribution the next token lies, 0 <= place < 1; the same until it is chosen."""
        if self._place is None:
            self._place = self._random.random()
        return self._place

    def take(self, token: int) -> Sampled:
        """The next token is one that was found at `place` by the likeliest `narrow_k`."""
        self._place = None
        return Sampled(token)

    def choose(self, row: CandidateRow) -> Sampled:
        """The next token.

        Raises EngineError for logits that have no largest finite value: they can only come from a broken engine.
        """
        if not (math.isfinite(row.log_sum_exp) and math.isfinite(row.values[0])):
            _refuse(row.logits())
        if self._plain:
            return Sampled(int(row.ids[0]))
        params, seen = self.params, self._seen_tokens(row.vocabulary)
        if params.temperature == 0:
            token = greedy(row, params.repetition_penalty, seen)
            if token is None:
                token = int(self._penalized(row.logits()).argmax())
        else:
            at, self._place = self.place, None
            choice = choose(row, params, seen)
            token = None if choice is None else choice.draw(at)
            if token is None:
                token = self._draw(self._penalized(row.logits()), at)
        self._count(token)
        return Sampled(token) if params.logprobs is None else _with_logprobs(token, row, params.logprobs)

    def sample(self, logits: np.ndarray) -> Sampled:
        """The next token, by the whole row alone: [vocabulary] float32. Raises EngineError as `choose` does."""
        params = self.params
        scores = self._penalized(logits)
        best = int(scores.argmax())  # a NaN counts as the largest
        if not math.isfinite(scores[best]):
            _refuse(scores)
        token = best
        if params.temperature > 0:
            token, self._place = self._draw(scores, self.place), None
        self._count(token)
        if params.logprobs is None:
            return Sampled(token)
        order = in_order(np.arange(len(logits)), logits)[: params.logprobs]
        shifted = logits - logits.max()
        total = float(logits.max()) + math.log(np.exp(shifted).sum(dtype=np.float64))
        return _with_logprobs(
            token, CandidateRow(logits[order], order, total, len(logits), lambda: logits), params.logprobs
        )

    def _seen_tokens(self, vocabulary: int) -> np.ndarray | None:
        if self._seen is None and self.params.repetition_penalty != 1:
            self._seen = np.zeros(vocabulary, bool)
            self._seen[self._prompt] = True
        return self._seen

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        seen = self._seen_tokens(len(logits))
        return logits if seen is None else penalize(logits, seen, self.params.repetition_penalty)

    def _count(self, token: int) -> None:
        if self._seen is not None:
            self._seen[token] = True

    def _draw(self, scores: np.ndarray, at: float) -> int:
        ids, weight = weights(scores, self.params)
        if ids is None:
            ids = np.arange(len(scores))
        order = in_order(ids, scores[ids])
        total = np.cumsum(weight[order], dtype=np.float64)
        place = int(np.searchsorted(total, at * total[-1], side="right"))
        return int(ids[order[min(place, len(order) - 1)]])


def _refuse(scores: np.ndarray) -> NoReturn:
    best = int(scores.argmax())
    raise EngineError(f"the decoder's logits are not usable: logit of token {best} is {scores[best]}")


def _with_logprobs(token: int, row: CandidateRow, count: int) -> Sampled:
    found = np.flatnonzero(row.ids == token)
    value = row.values[found[0]] if len(found) else row.logits()[token]
    top = zip(row.ids[:count].tolist(), row.values[:count].tolist(), strict=True)
    total = row.log_sum_exp
    return Sampled(token, float(value) - total, tuple((token_id, logit - total) for token_id, logit in top))
