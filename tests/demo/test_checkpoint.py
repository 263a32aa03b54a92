"""The committed checkpoint and evaluation set belong together and work."""

import json
import re

import pytest
import torch
from PIL import Image

from demo import checkpoint, evaluate, questions, tasks
from demo.images import CELL

LINES = evaluate.read_questions()


@pytest.fixture(scope="module")
def loaded():
    return checkpoint.load()


def test_eval_set_is_consistent():
    assert len({line["id"] for line in LINES}) == len(LINES) == sum(questions.COUNTS.values())
    for line in LINES:
        assert line["task"] in tasks.TASKS
        assert line["messages"][-1]["role"] == "user"
        for name, rows in zip(line["images"], line["digits"], strict=True):
            with Image.open(questions.EVAL / name) as image:
                assert image.size == (CELL * len(rows[0]), CELL * len(rows))


@pytest.mark.parametrize("task", ["digit", "read", "describe", "sum", "odd", "where", "two_images"])
def test_eval_answers_follow_from_the_digits(task):
    for line in (line for line in LINES if line["task"] == task):
        flat = [value for rows in line["digits"] for row in rows for value in row]
        said = [int(figure) for figure in re.findall(r"\d+", re.sub(r"row \d:", "", line["answer"]))]
        if task in ("digit", "read", "two_images"):
            assert said == flat
        elif task == "describe":
            assert said[len(said) - len(flat) :] == flat
        elif task == "odd":
            assert said[-1] == sum(value % 2 for value in flat)
        elif task == "sum":
            assert said[: len(flat)] == flat and said[-1] == sum(flat)
        else:
            wanted = int(re.search(r"\d", line["messages"][0]["content"][-1]["text"])[0])
            assert flat.count(wanted) == (not line["answer"].endswith("nowhere"))
            if wanted in flat:
                row, column = said[-2:]
                assert line["digits"][0][row - 1][column - 1] == wanted


def test_checkpoint_is_bf16_and_small():
    from safetensors import safe_open

    path = checkpoint.CHECKPOINT / "model.safetensors"
    assert path.stat().st_size < 12_000_000
    with safe_open(path, "pt") as file:
        names = file.keys()
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}


def test_checkpoint_answers_a_handful_of_held_out_questions(loaded):
    first: dict[str, list[dict]] = {}
    for line in LINES:
        first.setdefault(line["task"], []).append(line)
    handful = [line for lines in first.values() for line in lines[:2]]
    right = 0
    with torch.no_grad():
        for line in handful:
            images = [Image.open(questions.EVAL / name) for name in line["images"]]
            text, _ = evaluate.answer(*loaded, line["messages"], images)
            right += text == line["answer"]
    assert right >= 0.8 * len(handful)


def test_recorded_accuracy_meets_the_promise():
    metadata = json.loads((checkpoint.HERE / "training.json").read_text())
    assert metadata["questions"] == len(LINES)
    assert metadata["exact_per_task"]["digit"] >= 0.97
    assert metadata["exact"] >= 0.90


def test_no_expert_is_idle():
    metadata = json.loads((checkpoint.HERE / "training.json").read_text())
    for shares in metadata["expert_share_per_layer"]:
        assert abs(sum(shares) - 1) < 0.01
        assert min(shares) > 0.005
