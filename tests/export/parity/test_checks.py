"""When a token that went to other experts is a near tie, and when it is a mismatch."""

from types import SimpleNamespace

import numpy as np
import pytest

from moevlm.export.parity.checks import FirstChoices, _routing
from moevlm.export.parity.expected import DebugOutputs
from moevlm.export.parity.report import Check
from moevlm.export.parity.tolerances import Tolerance
from moevlm.plugins.ops.spec import RouterSpec

TOLERANCE = Tolerance(features=1e-4, logits=1e-4, near_tie=1e-3)


def check(ours: list[list[int]], logits: list[float], theirs: list[int], bias: list[float] | None = None) -> Check:
    """One sparse layer, number 3, of sigmoid routing: every row has the same logits and the same expected experts."""
    config = SimpleNamespace(moe_layers=(3,), moe={3: SimpleNamespace(router=RouterSpec(len(theirs), "sigmoid"))})
    expected = SimpleNamespace(
        config=config,
        routing=[np.array([theirs] * len(ours))],
        router_logits=[np.array([logits] * len(ours), np.float32)],
        biases=[None if bias is None else np.array(bias, np.float32)],
    )
    return _routing(expected, "engine", DebugOutputs({"layers.3.expert_index": np.array(ours)}), TOLERANCE)


def test_order_of_the_chosen_experts_does_not_count() -> None:
    assert check([[2, 0], [0, 2]], [2.0, 0.0, 1.0], [0, 2]) == Check(
        "engine", "routings that differ", 0.0, 0, True, "of 2"
    )


def test_flip_at_a_near_tie_is_counted_named_and_passes() -> None:
    found = check([[0, 1], [0, 2]], [2.0, 1.0, 1.001], [0, 2])
    assert found.passed
    assert found.value == 1
    assert found.note.startswith("of 2, first in layer 3, widest margin 2.0e-04")  # sigmoid'(1) * 0.001


@pytest.mark.parametrize(
    ("mine", "logits"),
    [
        ([0, 1], [2.0, 1.0, 1.1]),  # the lower score was taken
        ([0, 1], [2.0, 1.1, 1.0]),  # the higher score, which groups had ruled out
        ([0, 0], [2.0, 1.0, 1.0]),  # one expert twice
    ],
)
def test_flip_without_a_tie_fails(mine: list[int], logits: list[float]) -> None:
    found = check([mine], logits, [0, 2])
    assert not found.passed
    assert found.value == 1


def test_margin_is_in_the_scores_that_choose_bias_included() -> None:
    assert check([[0, 1]], [2.0, 0.0, 0.0], [0, 2], bias=[0.5, 0.5, 0.5005]).passed
    assert not check([[0, 1]], [2.0, 0.0, 0.0], [0, 2], bias=[0.5, 0.1, 0.5]).passed
    assert not check([[0, 1]], [2.0, 0.0, 3.0], [0, 2], bias=[0.5, 0.5, 0.5]).passed


@pytest.mark.parametrize(
    ("ours", "different", "passed"),
    [
        ([[1.0, 4.0, 4.0003]], 0, True),
        ([[1.0, 4.0004, 4.0003]], 1, True),  # closer than two errors of 1e-4 of the largest
        ([[4.1, 4.0, 4.0003]], 1, False),
        ([[np.nan, 4.0, 4.0003]], 1, False),
    ],
)
def test_another_first_choice_passes_at_a_near_tie_only(ours: list, different: int, passed: bool) -> None:
    theirs = np.array([[1.0, 4.0, 4.0003]], np.float32)
    choices = FirstChoices()
    choices.add(theirs, theirs)
    choices.add(np.array(ours, np.float32), theirs)
    found = choices.check("engine", 1e-4)
    assert (found.value, found.passed) == (different, passed)
    assert found.note.startswith("of 2")


def test_first_choices_of_another_vocabulary_fail() -> None:
    choices = FirstChoices()
    choices.add(np.zeros((1, 3)), np.zeros((1, 4)))
    assert not choices.check("engine", 1e-4).passed
