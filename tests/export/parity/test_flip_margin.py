"""The margin of a flipped routing against perturbed logits, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.variants import MODELS, ROUTERS
from moevlm.export.parity.flip_margin import flip_margin
from moevlm.plugins.ops.router import choice_scores, route
from moevlm.plugins.ops.spec import RouterSpec

# How far a score moves at most where every logit moves by 1: a softmax's slopes add up to 2 s (1 - s).
SLOPE = {"softmax": 0.5, "sigmoid": 0.25, "softmax_after_topk": 1.0}
SPECS = ROUTERS | MODELS | {"many": RouterSpec(top_k=9, n_group=5, topk_group=3, group_score="top2_sum")}


def margins(logits: np.ndarray, index: np.ndarray, spec: RouterSpec, bias: np.ndarray | None) -> list[float]:
    choice = choice_scores(logits, spec, bias)
    return [flip_margin(scores, chosen, spec) for scores, chosen in zip(choice, index, strict=True)]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(SPECS)), st.booleans(), st.sampled_from([1e-3, 0.03, 0.3, 1.0]), st.integers(0, 2**32 - 1)
)
def test_margin_of_a_flip_is_at_most_what_the_logits_moved(name: str, biased: bool, moved: float, seed: int) -> None:
    spec, rng = SPECS[name], np.random.default_rng(seed)
    experts = 8 if spec.top_k < 9 else 130
    logits = rng.standard_normal((16, experts), np.float32)
    bias = rng.standard_normal(experts, np.float32) * 0.3 if biased else None
    other = logits + rng.uniform(-moved, moved, logits.shape).astype(np.float32)
    found = margins(logits, route(other, spec, bias)[0], spec, bias)
    assert max(found) <= 2 * SLOPE[spec.scoring] * moved + 1e-5


@pytest.mark.parametrize("name", SPECS)
def test_margin_of_the_reference_choice_is_nothing_and_of_the_worst_experts_is_wide(name: str) -> None:
    spec, rng = SPECS[name], np.random.default_rng(0)
    logits = rng.standard_normal((32, 8 if spec.top_k < 9 else 130), np.float32)
    assert max(margins(logits, route(logits, spec)[0], spec, None)) == 0
    worst = margins(logits, route(-logits, spec)[0], spec, None)
    spread = np.ptp(choice_scores(logits, spec), axis=1)
    assert np.median(worst / spread) > 0.25


def test_flipped_group_is_as_near_as_its_group_score() -> None:
    spec = RouterSpec(top_k=2, scoring="softmax_after_topk", n_group=2, topk_group=1, group_score="max")
    scores = np.array([1.0, -5, 0.99, 0.5])
    assert flip_margin(scores, np.array([2, 3]), spec) == pytest.approx(0.01)
    assert flip_margin(scores, np.array([1, 0]), spec) == 0
    sums = RouterSpec(top_k=2, scoring="softmax_after_topk", n_group=2, topk_group=1, group_score="top2_sum")
    assert flip_margin(np.array([1.0, 0.5, 0.8, 0.6]), np.array([2, 3]), sums) == pytest.approx(0.05)


def test_kept_group_without_a_chosen_expert_is_the_one_that_explains_most() -> None:
    # Groups 0 and 1 score best, but then expert 2 would have been chosen; keeping group 2 explains it at less.
    spec = RouterSpec(top_k=2, scoring="softmax_after_topk", n_group=3, topk_group=2, group_score="max")
    scores = np.array([1.0, 0.5, 0.9, 0, 0.8, 0.2])
    assert flip_margin(scores, np.array([0, 1]), spec) == pytest.approx(0.3)
    assert flip_margin(np.array([1.0, 0.5, 0.9, 0, 0.89, 0.2]), np.array([0, 4]), spec) == pytest.approx(0.01)


@pytest.mark.parametrize("chosen", [[0, 0], [0, 8], [-1, 0], [0, 2]])
def test_choice_that_no_scores_lead_to_is_infinitely_far(chosen: list[int]) -> None:
    spec = RouterSpec(top_k=2, n_group=4, topk_group=1)
    assert flip_margin(np.zeros(8), np.array(chosen), spec) == float("inf")
