"""The held-out evaluation set: `python -m demo.questions` writes demo/eval and demo/samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import numpy as np
from PIL import Image

from demo import tasks
from demo.checkpoint import HERE
from demo.images import Grid, draw_grid, render

EVAL = HERE / "eval"
SAMPLES = HERE / "samples"
STRENGTH = 0.6  # drawn more calmly than the training images
COUNTS = {
    "digit": 160,
    "read": 45,
    "describe": 35,
    "where": 45,
    "odd": 35,
    "sum": 35,
    "two_images": 20,
    "dialogue": 20,
    "classify": 35,
    "to_chinese": 30,
    "to_english": 30,
    "add": 25,
    "summarise": 35,
}


def write_images(grids: tuple[Grid, ...], name: str, folder: Path, rng: np.random.Generator) -> list[str]:
    paths = []
    for number, grid in enumerate(grids):
        path = f"images/{name}{'ab'[number] if len(grids) > 1 else ''}.png"
        Image.fromarray(render(grid, rng, STRENGTH)).save(folder / path, optimize=True)
        paths.append(path)
    return paths


def write_eval(seed: int) -> int:
    shutil.rmtree(EVAL, ignore_errors=True)
    (EVAL / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines, asked = [], set()
    for task, count in COUNTS.items():
        made = 0
        while made < count:
            sample = tasks.TASKS[task][0](rng, True)
            if (sample.turns, sample.grids) in asked:
                continue
            asked.add((sample.turns, sample.grids))
            name = f"{task}-{made:03d}"
            *messages, answer = sample.messages()
            line = {
                "id": name,
                "task": task,
                "images": write_images(sample.grids, name, EVAL, rng),
                "digits": [grid.values for grid in sample.grids],
                "messages": messages,
                "answer": answer["content"],
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            made += 1
    (EVAL / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def write_samples(seed: int) -> None:
    shutil.rmtree(SAMPLES, ignore_errors=True)
    SAMPLES.mkdir()
    rng = np.random.default_rng(seed)
    entries = []
    for rows, cols in ((3, 3), (2, 3), (1, 5), (2, 2)):
        grid = draw_grid(rng, rows, cols, held_out=True)
        name = f"grid-{rows}x{cols}.png"
        Image.fromarray(render(grid, rng, STRENGTH)).save(SAMPLES / name, optimize=True)
        asks = ["read", "describe", "where", "odd"] + ["sum"] * ((rows, cols) in tasks.SUM_SHAPES)
        turns = [tasks.ASKS[task](grid, rng) for task in asks]
        questions = [{"question": t.question, "answer": t.answer} for t in turns]
        entries.append({"image": name, "digits": grid.values, "questions": questions})
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    (SAMPLES / "samples.json").write_text(text + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.option("--seed", default=2024, show_default=True)
def main(seed: int) -> None:
    count = write_eval(seed)
    write_samples(seed + 1)
    click.echo(f"{count} questions")


if __name__ == "__main__":
    main()
