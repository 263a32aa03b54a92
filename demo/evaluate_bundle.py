"""A bundle's greedy answers to the held-out questions, beside those of transformers: `python -m demo.evaluate_bundle`.

transformers' answers are those that training recorded in demo/training.json.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
from rich.progress import track

import moevlm.runtime
from demo.checkpoint import HERE
from moevlm.runtime.cli.console import console, table
from moevlm.runtime.engine.generate import Runtime

QUESTIONS = HERE / "eval" / "questions.jsonl"
RECORD = HERE / "training.json"


def answers(runtime: Runtime, questions: list[dict]) -> dict[str, str]:
    """Question id to the whole greedy answer."""
    return {q["id"]: _answer(runtime, q) for q in track(questions, "answering", transient=True)}


def recorded_answers(questions: list[dict]) -> dict[str, str]:
    """What transformers answered when the checkpoint was evaluated: the right answer, but for the wrong ones listed."""
    wrong = {entry["id"]: entry["got"] for entry in json.loads(RECORD.read_text(encoding="utf-8"))["wrong"]}
    return {q["id"]: wrong.get(q["id"], q["answer"]) for q in questions}


def read_questions() -> list[dict]:
    """The committed questions."""
    return [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]


def _answer(runtime: Runtime, question: dict) -> str:
    images = iter(question["images"])
    messages = [{**m, "content": _with_images(m["content"], images)} for m in question["messages"]]
    return "".join(piece.text for piece in runtime.generate(messages, max_new_tokens=96, temperature=0))


def _with_images(content: str | list[dict], images: Iterator[str]) -> str | list[dict]:
    """The content with each image placeholder given its file."""
    if isinstance(content, str):
        return content
    return [
        {"type": "image", "image": QUESTIONS.parent / next(images)} if part["type"] == "image" else part
        for part in content
    ]


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, help="Which engines; repeatable.  [default: one]")
def main(bundle: Path, targets: tuple[str, ...]) -> None:
    questions = read_questions()
    transformers = recorded_answers(questions)
    for target in targets or (None,):
        found = answers(moevlm.runtime.load(bundle, target), questions)
        right: dict[str, list[bool]] = defaultdict(list)
        for question in questions:
            right[question["task"]].append(found[question["id"]] == question["answer"])
        right["all"] = [verdict for verdicts in list(right.values()) for verdict in verdicts]
        rows = [(task, str(len(v)), f"{100 * sum(v) / len(v):.1f} %") for task, v in right.items()]
        console().print(table(f"{bundle} on {target or 'its default engine'}", ("task", "questions", "exact"), rows))
        differ = sum(found[name] != transformers[name] for name in found)
        console().print(f"answers that differ from transformers': {differ} of {len(questions)}")


if __name__ == "__main__":
    main()
