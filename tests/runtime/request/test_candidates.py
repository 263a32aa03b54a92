"""The likeliest tokens decide as the whole row does, or ask for it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.request.candidates import CandidateRow, choose
from moevlm.runtime.request.distribution import penalize, weights
from moevlm.runtime.request.sampler import Sampler
from moevlm.runtime.request.sampling import SamplingParams

OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 0.7},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 7},
    {"top_k": 256},
    {"top_k": 5000},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"top_p": 0.9999},
    {"top_p": 0.9, "temperature": 0.7},
    {"top_p": 0.9, "temperature": 1.4},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"min_p": 0.1, "top_p": 0.7},
    {"min_p": 0.3, "top_k": 40, "temperature": 2.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"top_p": 0.8, "repetition_penalty": 1.1},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.05},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
]


class Row:
    """Counts how often the whole row is asked for."""

    def __init__(self, logits: np.ndarray, count: int = 256) -> None:
        self.asked = 0
        self.logits = logits
        order = np.lexsort((np.arange(len(logits)), -logits))[:count]
        with np.errstate(invalid="ignore"):  # of logits that are not usable
            total = np.float32(np.logaddexp.reduce(logits.astype(np.float64)))
        self.candidates = CandidateRow(logits[order], order.astype(np.int32), float(total), len(logits), self._ask)

    def _ask(self) -> np.ndarray:
        self.asked += 1
        return self.logits


def random_logits(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    match kind:
        case "flat":
            return (rng.standard_normal(size) * 0.01).astype(np.float32)
        case "peaked":
            return (rng.standard_normal(size) * 4 - 3).astype(np.float32)
        case "tied":
            return rng.integers(-3, 4, size).astype(np.float32)
        case other:
            raise ValueError(other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["flat", "peaked", "tied"])
@pytest.mark.parametrize("size", [100, 256, 257, 3000])
def test_candidates_choose_the_token_that_the_whole_row_gives(options, kind, size):
    rng = np.random.default_rng(size)
    params = SamplingParams(**{"temperature": 1.0, "seed": 7, **options})
    history = rng.integers(0, size, size // 10)
    few, whole = Sampler(params, history), Sampler(params, history)
    for _ in range(40):
        row = Row(random_logits(rng, kind, size))
        assert few.choose(row.candidates) == whole.sample(row.logits)


@pytest.mark.parametrize("above", [300, 720, 740, 1000])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_p": 0.999, "repetition_penalty": 1.1}], ids=str)
def test_a_likeliest_token_far_above_all_others_hides_none_of_them_at_a_high_temperature(above, options):
    rng = np.random.default_rng(above)
    params = SamplingParams(temperature=100.0, seed=7, **options)
    few, whole = Sampler(params, [1, 2, 3]), Sampler(params, [1, 2, 3])
    for _ in range(40):
        logits = random_logits(rng, "peaked", 300)
        logits[5] += above
        row = Row(logits)
        assert few.choose(row.candidates) == whole.sample(row.logits)


@pytest.mark.parametrize("options", [options for options in OPTIONS if options.get("temperature") != 0], ids=str)
@pytest.mark.parametrize("kind", ["flat", "peaked", "tied"])
def test_kept_sets_are_equal_and_bounds_hold(options, kind):
    rng = np.random.default_rng(3)
    params = SamplingParams(**{"temperature": 1.0, **options})
    decided = 0
    for _ in range(60):
        row = Row(random_logits(rng, kind, 2000))
        seen = rng.random(2000) < 0.1
        penalized = params.repetition_penalty != 1
        choice = choose(row.candidates, params, seen if penalized else None)
        if choice is None:
            continue
        decided += 1
        scores = penalize(row.logits, seen, params.repetition_penalty) if penalized else row.logits
        ids, weight = weights(scores, params)
        exact = np.zeros(2000)
        exact[np.arange(2000) if ids is None else ids] = weight
        assert choice.weight[0] == 1
        np.testing.assert_array_equal(choice.weight, exact[choice.ids].astype(np.float32))
        rest = np.delete(exact, choice.ids).sum()
        if choice.high == 0:
            assert set(choice.ids.tolist()) == set(np.flatnonzero(exact).tolist())
        else:
            assert choice.low <= rest * (1 + 1e-6)
            assert rest <= choice.high * (1 + 1e-6)
    sharp = params.temperature <= 1 and params.repetition_penalty == 1 and params.top_p < 0.99
    if kind == "peaked" and (sharp or 0 < params.top_k < 100) and params.top_k < 1000:
        assert decided > 50


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"temperature": 0.0}, 0),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, 0),
        ({"top_k": 20, "top_p": 0.8, "temperature": 0.7}, 0),
        ({"top_p": 0.8, "temperature": 0.7}, 5),
        ({"temperature": 0.7}, 15),
        ({"temperature": 1.0}, 60),
        ({"min_p": 0.05}, 0),
    ],
    ids=str,
)
def test_the_row_is_asked_for_only_where_the_candidates_do_not_tell(options, most):
    rng = np.random.default_rng(5)
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 1, **options}), [1, 2, 3])
    rows = [Row((rng.standard_normal(20_000) * 2).astype(np.float32)) for _ in range(200)]
    for row in rows:
        row.candidates.values[0] += 6  # nearly sure of one token, as a model is
        row.logits[row.candidates.ids[0]] += 6
        total = float(np.logaddexp.reduce(row.logits.astype(np.float64)))
        sampler.choose(CandidateRow(row.candidates.values, row.candidates.ids, total, 20_000, row.candidates.logits))
    assert sum(row.asked for row in rows) <= most


def test_a_plain_draw_asks_for_the_row_as_often_as_it_falls_beyond_the_candidates():
    logits = np.zeros(1000, np.float32)
    logits[:4] = np.log(1000 - 4)  # 4 / 5 of the mass are theirs
    row, sampler = Row(logits, count=4), Sampler(SamplingParams(temperature=1.0, seed=2))
    counts = np.bincount([sampler.choose(row.candidates).token_id for _ in range(4000)], minlength=1000)
    assert 0.17 < row.asked / 4000 < 0.23
    assert chisquare(np.append(counts[:4], counts[4:].sum()), np.full(5, 800)).pvalue > 1e-3
    assert np.count_nonzero(counts[4:]) > 400


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.8])
def test_draws_from_candidates_follow_the_distribution(temperature):
    rng = np.random.default_rng(8)
    row = Row((rng.standard_normal(400) * 1.5).astype(np.float32), count=64)
    sampler = Sampler(SamplingParams(temperature=temperature, top_p=0.95, seed=4))
    ids, weight = weights(row.logits, sampler.params)
    counts = np.bincount([sampler.choose(row.candidates).token_id for _ in range(6000)], minlength=400)
    assert counts.sum() == counts[ids].sum()
    assert chisquare(counts[ids], 6000 * weight / weight.sum(dtype=np.float64)).pvalue > 1e-3


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "repetition_penalty": 1.2}], ids=str)
def test_logprobs_from_candidates_equal_those_of_the_row(options):
    rng = np.random.default_rng(6)
    params = SamplingParams(seed=3, logprobs=5, **options)
    few, whole = Sampler(params, [4, 5]), Sampler(params, [4, 5])
    for _ in range(30):
        row = Row(rng.standard_normal(500).astype(np.float32), count=20)
        got, expected = few.choose(row.candidates), whole.sample(row.logits)
        assert got.token_id == expected.token_id
        assert [i for i, _ in got.top] == [i for i, _ in expected.top]
        np.testing.assert_allclose(
            [got.logprob, *(p for _, p in got.top)], [expected.logprob, *(p for _, p in expected.top)], atol=1e-5
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unusable_logits_are_an_error_and_not_a_token(temperature, bad):
    logits = np.zeros(300, np.float32)
    logits[4] = bad
    row = Row(logits)
    with pytest.raises(EngineError, match="logit of token 4"):
        Sampler(SamplingParams(temperature=temperature)).choose(row.candidates)
    nothing = Row(np.full(300, -np.inf, np.float32))
    with pytest.raises(EngineError, match="logit of token 0 is -inf"):
        Sampler(SamplingParams(temperature=temperature)).choose(nothing.candidates)
