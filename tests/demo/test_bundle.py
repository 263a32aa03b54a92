"""The committed checkpoint as a bundle: the held-out questions, on every fp32 engine and on moevlm's own kernels."""

import pytest

import moevlm.runtime
from demo import evaluate_bundle
from demo.checkpoint import CHECKPOINT
from moevlm.export.build import build

TARGETS = ("reference", "ort-cpu")
POINTS = {"cpu:int8": 0.5, "cpu:int4": 1.5}  # of a hundred answers, that rounding the weights may cost


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return build(CHECKPOINT, tmp_path_factory.mktemp("demo") / "demo.moevlm", [*TARGETS, *POINTS]).directory


@pytest.mark.parametrize("target", TARGETS)
def test_every_held_out_question_gets_the_answer_that_transformers_gave(bundle, target):
    questions = evaluate_bundle.read_questions()
    found = evaluate_bundle.answers(moevlm.runtime.load(bundle, target), questions)
    expected = evaluate_bundle.recorded_answers(questions)
    assert {name: found[name] for name in found if found[name] != expected[name]} == {}


@pytest.mark.parametrize("target", POINTS)
def test_quantized_engines_answer_as_well(bundle, target):
    questions = evaluate_bundle.read_questions()
    found = evaluate_bundle.answers(moevlm.runtime.load(bundle, target), questions)
    expected = evaluate_bundle.recorded_answers(questions)
    lost = sum((expected[q["id"]] == q["answer"]) - (found[q["id"]] == q["answer"]) for q in questions)
    assert 100 * lost / len(questions) <= POINTS[target]


def test_the_recorded_answers_are_good_enough_to_ship():
    questions = evaluate_bundle.read_questions()
    expected = evaluate_bundle.recorded_answers(questions)
    right = {q["id"]: expected[q["id"]] == q["answer"] for q in questions}
    digits = [right[q["id"]] for q in questions if q["task"] == "digit"]
    assert sum(digits) >= 0.97 * len(digits)
    assert sum(right.values()) >= 0.90 * len(right)
