import dataclasses
from typing import get_type_hints

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moevlm.runtime.core.errors import EngineError, RequestError
from moevlm.runtime.request.distribution import penalize, weights
from moevlm.runtime.request.sampler import Sampled, Sampler
from moevlm.runtime.request.sampling import MIN_PENALTY, SamplingOptions, SamplingParams


def distribution(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Token ids that may be drawn, and their probabilities."""
    ids, weight = weights(scores, params)
    assert weight.dtype == np.float32
    assert weight.max() == 1
    return np.arange(len(scores)) if ids is None else ids, weight / weight.sum(dtype=np.float64)


def _huggingface(logits: np.ndarray, history: list[int], params: SamplingParams) -> np.ndarray:
    """Probabilities [vocabulary] as transformers' generate() would draw from."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    scores = chain(torch.tensor([history]), torch.tensor(logits)[None].clone())
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 7},
        {"top_k": 5000},
        {"top_p": 0.8},
        {"top_p": 1e-6},
        {"top_p": 0.9999},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"min_p": 0.1, "top_p": 0.7},
        {"min_p": 0.3, "top_k": 40, "temperature": 2.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"temperature": 1.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.01, 3.0])  # nearly flat: the nucleus is wide; peaked: it is narrow
def test_distribution_equals_huggingface_warpers(options, scale):
    rng = np.random.default_rng(len(str(options)))
    for _ in range(5):
        logits = (rng.standard_normal(3000) * scale).astype(np.float32)
        history = rng.integers(0, 3000, 400).tolist() + [int(logits.argmax())] * 2
        params = SamplingParams(**{"temperature": 1.0, **options})
        ids, probability = distribution(penalize(logits, np.array(history), params.repetition_penalty), params)
        dense = np.zeros(3000)
        dense[ids] = probability
        expected = _huggingface(logits, history, params)
        # The reference sums thousands of float32 probabilities, which may move the nucleus' edge by one entry.
        differing = (dense > 0) != (expected > 0)
        assert np.count_nonzero(differing) <= (1 if params.top_p < 1 else 0)
        np.testing.assert_allclose(dense[~differing], expected[~differing], rtol=1e-3 if differing.any() else 1e-4)


def test_ties_at_the_kth_place_all_stay():
    logits = np.array([1, 3, 3, 3, 0], np.float32)
    ids, probability = distribution(logits, SamplingParams(temperature=1.0, top_k=2))
    assert ids.tolist() == [1, 2, 3]
    np.testing.assert_allclose(probability, 1 / 3)


def test_wide_nucleus_over_a_large_vocabulary_equals_a_full_sort():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(20_000).astype(np.float32)
    ids, _ = distribution(logits, SamplingParams(temperature=1.0, top_p=0.95))
    probability = np.exp(logits.astype(np.float64))
    probability /= probability.sum()
    order = np.argsort(-probability)
    above = np.cumsum(probability[order]) - probability[order]
    assert ids.tolist() == sorted(order[above < 0.95].tolist())


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.1, 0.3, 0.1], np.float32))
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3))
    counts = np.bincount([sampler.sample(logits).token_id for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.1, 0.3, 0.1], atol=0.03)


def test_same_seed_gives_same_tokens_and_another_seed_others():
    rng = np.random.default_rng(1)
    steps = rng.standard_normal((40, 500)).astype(np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, top_k=100, top_p=0.95, seed=seed))
        return [sampler.sample(logits).token_id for logits in steps]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_requests_do_not_share_a_random_stream():
    logits = np.zeros(1000, np.float32)
    alone = Sampler(SamplingParams(temperature=1.0, seed=9))
    expected = [alone.sample(logits).token_id for _ in range(20)]
    one, other = (Sampler(SamplingParams(temperature=1.0, seed=seed)) for seed in (9, 10))
    mixed = []
    for _ in range(20):
        mixed.append(one.sample(logits).token_id)
        other.sample(logits)
    assert mixed == expected


def test_greedy_takes_the_largest_and_the_penalty_counts_once_for_repeated_tokens():
    logits = np.array([1.0, 4.0, 3.5, -1.0], np.float32)
    assert Sampler(SamplingParams(), [1, 1, 1]).sample(logits) == Sampled(1)
    # 4 / 1.1 = 3.64 is still the largest; 4 / 1.1**2 would not be.
    assert Sampler(SamplingParams(repetition_penalty=1.1), [1, 1]).sample(logits).token_id == 1
    assert Sampler(SamplingParams(repetition_penalty=1.2), [1, 1]).sample(logits).token_id == 2
    assert logits.tolist() == [1.0, 4.0, 3.5, -1.0]


def test_penalty_sees_what_was_generated_too():
    logits = np.array([1.0, 4.0, 3.9, 3.8], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), [0])
    assert [sampler.sample(logits).token_id for _ in range(6)] == [1, 2, 3, 1, 1, 1]


def test_equal_entries_at_the_edge_of_the_nucleus_stay_by_the_lower_id():
    ids, probability = distribution(np.zeros(1000, np.float32), SamplingParams(temperature=1.0, top_p=0.5))
    assert ids.tolist() == list(range(500))
    np.testing.assert_allclose(probability, 1 / 500)


def test_logprobs_are_of_the_raw_distribution():
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal(400) * 5).astype(np.float32)
    expected = torch.tensor(logits).double().log_softmax(-1)
    params = SamplingParams(temperature=0.2, top_k=3, repetition_penalty=1.5, seed=0, logprobs=6)
    sampled = Sampler(params, [int(logits.argmax())]).sample(logits)
    assert sampled.logprob == pytest.approx(float(expected[sampled.token_id]), abs=1e-5)
    values, ids = expected.topk(6)
    assert [i for i, _ in sampled.top] == ids.tolist()
    assert [p for _, p in sampled.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_zero_alternatives_still_report_the_chosen_token():
    sampled = Sampler(SamplingParams(logprobs=0)).sample(np.log(np.array([0.25, 0.75], np.float32)))
    assert sampled.logprob == pytest.approx(np.log(0.75), abs=1e-6)
    assert sampled.top == ()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unusable_logits_are_an_error_and_not_a_token(temperature, bad):
    logits = np.zeros(10, np.float32)
    logits[4] = bad
    with pytest.raises(EngineError, match="logit of token 4"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits)


def test_tiny_temperature_is_greedy():
    logits = np.array([1.0, 1.0001, 0.0], np.float32)
    sampler = Sampler(SamplingParams(temperature=5e-324))
    assert {sampler.sample(logits).token_id for _ in range(20)} == {1}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_new_tokens", 0, "1 to"),
        ("max_new_tokens", True, "whole number"),
        ("max_new_tokens", 1.5, "whole number"),
        ("temperature", -0.1, "0 to 100"),
        ("temperature", float("nan"), "0 to 100"),
        ("temperature", float("inf"), "0 to 100"),
        ("temperature", "hot", "0 to 100"),
        ("top_k", -1, "0 to"),
        ("top_p", 0, "above 0, up to 1"),
        ("top_p", 1.01, "above 0, up to 1"),
        ("min_p", 1.01, "0 to 1"),
        ("repetition_penalty", 0.0, "0.001 to 100"),
        ("repetition_penalty", 1e-37, "0.001 to 100"),
        ("seed", -1, "0 to"),
        ("seed", 2**63, "0 to"),
        ("stop", ("a",) * 17, "at most 16"),
        ("stop", ("",), "1 to 256 characters"),
        ("stop", ("x" * 257,), "1 to 256 characters"),
        ("stop", (3,), "1 to 256 characters"),
        ("stop", 3, "at most 16"),
        ("stop", ("\ud800",), "lone surrogate"),
        ("top_k", 5, "temperature above 0"),
        ("top_p", 0.5, "temperature above 0"),
        ("min_p", 0.5, "temperature above 0"),
        ("skip_special_tokens", "no", "true or false"),
        ("logprobs", 21, "0 to 20"),
        ("ignore_eos", 1, "true or false"),
    ],
    ids=str,
)
def test_bad_value_is_refused_in_one_line_with_field_value_and_range(field, value, allowed):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert "\n" not in message
    told = value[0] if field == "stop" and isinstance(value, tuple) and len(value) == 1 else value  # the wrong one
    spelled = "true" if told is True else repr(told)
    assert f"{field} = {spelled}"[:50].replace("'", '"') in message.replace("'", '"')
    assert allowed in message


def test_one_stop_string_or_a_list_becomes_a_tuple():
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_none_stands_for_the_default():
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()
    chosen = SamplingParams(temperature=0.5, top_k=3, stop=("a",))
    assert chosen.updated(dict.fromkeys(names)) == chosen


def test_options_are_the_fields():
    assert list(get_type_hints(SamplingOptions)) == [field.name for field in dataclasses.fields(SamplingParams)]


def test_temperature_of_0_switches_off_what_narrows_the_choice():
    chosen = SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    assert chosen.updated({"temperature": 0}) == SamplingParams(repetition_penalty=1.1)
    with pytest.raises(RequestError, match=r"top_k = 4 \(allowed: with a temperature above 0"):
        chosen.updated({"temperature": 0, "top_k": 4})


def test_smallest_repetition_penalty_keeps_logits_finite():
    logits = np.array([1e30, -1e30, 3.0], np.float32)
    assert np.isfinite(penalize(logits, np.arange(3), MIN_PENALTY)).all()
