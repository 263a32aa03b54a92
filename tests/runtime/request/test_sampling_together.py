"""Tokens chosen for many requests at once are those that each would choose alone, in the same order of its numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from moevlm.runtime.request.candidates import CandidateRow
from moevlm.runtime.request.sampler import Sampler
from moevlm.runtime.request.sampling import SamplingParams
from moevlm.runtime.request.sampling_together import chosen_together

VOCABULARY, COUNT = 500, 64
NARROW = [
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 1},
    {"top_k": 63, "temperature": 3.0},
    {"top_k": 5, "top_p": 1e-6},
    {"top_k": 40, "top_p": 0.95},
    {"top_k": 7, "temperature": 1e-20},
]
OTHERS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"top_p": 0.9},
    {"top_k": 20, "min_p": 0.1},
    {"top_k": 64},
    {"top_k": 20, "repetition_penalty": 1.1},
    {"top_k": 20, "logprobs": 2},
    {"top_k": 20, "temperature": 1e-38},
]


def params(options: Iterable[dict[str, float]]) -> list[SamplingParams]:
    return [SamplingParams(**{"temperature": 1.0, "seed": n} | one) for n, one in enumerate(options)]


def rows(rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[CandidateRow]]:
    """[L, vocabulary] logits, every third row with many equal ones, and the candidates of each."""
    logits = rng.standard_normal((count, VOCABULARY)).astype(np.float32) * rng.choice([0.5, 2, 8], (count, 1))
    logits[::3] = np.round(logits[::3])
    order = np.argsort(-logits, axis=1, kind="stable")[:, :COUNT].astype(np.int32)
    total = np.log(np.exp(logits.astype(np.float64)).sum(axis=1)).astype(np.float32)
    return logits, [
        CandidateRow(row[own], own, float(one), VOCABULARY, lambda row=row: row)
        for row, own, one in zip(logits, order, total, strict=True)
    ]


def together(samplers: list[Sampler], found: list[CandidateRow]) -> list[int | None]:
    totals = np.array([row.log_sum_exp for row in found], np.float32)
    return chosen_together(
        samplers, np.stack([row.values for row in found]), np.stack([row.ids for row in found]), totals
    )


def test_every_request_gets_the_tokens_that_it_gets_alone() -> None:
    rng = np.random.default_rng(3)
    chosen = params([*NARROW, *OTHERS] * 3)
    alone, shared = ([Sampler(one, [1, 2, 3]) for one in chosen] for _ in range(2))
    narrow = 0
    for _ in range(60):
        _, found = rows(rng, len(chosen))
        tokens = together(shared, found)
        for one, other, row, token in zip(alone, shared, found, tokens, strict=True):
            expected = one.choose(row)
            assert (other.choose(row) if token is None else other.take(token)) == expected
            narrow += token is not None
        assert all(token is None for token, one in zip(tokens, chosen, strict=True) if one.min_p or one.logprobs)
    assert narrow > 60 * 3 * len(NARROW) * 0.6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_usable_are_left_to_their_sampler(bad: float) -> None:
    _, found = rows(np.random.default_rng(0), 6)
    found[1].values[0] = bad
    tokens = together([Sampler(one) for one in params([NARROW[0]] * 6)], found)
    assert [token is None for token in tokens][1::3] == [True, False]
    assert tokens[2] is not None


def test_a_tie_at_the_end_of_the_likeliest_is_left_to_its_sampler() -> None:
    _, found = rows(np.random.default_rng(1), 5)
    found[2].values[20] = found[2].values[19]
    tokens = together([Sampler(one) for one in params([NARROW[0]] * 5)], found)
    assert tokens[2] is None
    assert tokens[1] is not None


def test_few_rows_are_left_to_their_samplers() -> None:
    _, found = rows(np.random.default_rng(2), 3)
    assert together([Sampler(one) for one in params([NARROW[0]] * 3)], found) == [None] * 3
