"""Every task as question-and-answer samples in one instruction format."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from demo import numerals, texts
from demo.images import Grid, draw_grid

Rng = np.random.Generator
Option = TypeVar("Option")


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """A dialogue; its pictures come first in the first question."""

    task: str
    turns: tuple[Turn, ...]
    grids: tuple[Grid, ...] = ()

    def messages(self) -> list[dict]:
        out: list[dict] = []
        for number, turn in enumerate(self.turns):
            content: str | list[dict] = turn.question
            if number == 0 and self.grids:
                images = [{"type": "image"} for _ in self.grids]
                content = [*images, {"type": "text", "text": turn.question}]
            out.append({"role": "user", "content": content})
            out.append({"role": "assistant", "content": turn.answer})
        return out


def is_held_out(key: str) -> bool:
    """One in eight text items, by content, is kept for evaluation."""
    return zlib.crc32(key.encode()) % 8 == 0


def pick(rng: Rng, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


# --- questions on one grid -------------------------------------------------------------------


def row_texts(grid: Grid) -> list[str]:
    """`3 5 1`, or with each row named: `row 1: 3 5`, `row 2: 2 7`."""
    rows = [" ".join(map(str, row)) for row in grid.values]
    return rows if len(rows) == 1 else [f"row {number}: {row}" for number, row in enumerate(rows, 1)]


def rows_text(grid: Grid) -> str:
    return ", ".join(row_texts(grid))


def ask_read(grid: Grid, rng: Rng) -> Turn:
    if grid.shape == (1, 1):
        asks = ("Which digit is this?", "Read the digit.", "What digit do you see?")
    else:
        asks = ("Read the digits.", "Which digits are in the image?", "Read the grid row by row.")
    return Turn(pick(rng, asks), rows_text(grid))


def ask_describe(grid: Grid, rng: Rng) -> Turn:
    asks = ("Describe the image.", "What is in this image?", "What do you see? Use a sentence.")
    rows, cols = grid.shape
    if (rows, cols) == (1, 1):
        head = "A handwritten digit:"
    elif rows == 1:
        head = f"A row of {cols} handwritten digits:"
    else:
        head = f"A {rows} by {cols} grid of handwritten digits,"
    return Turn(pick(rng, asks), f"{head} {rows_text(grid)}.")


def ask_where(grid: Grid, rng: Rng) -> Turn:
    """Only digits that occur once, or (one time in six) not at all."""
    flat = grid.flat
    single = [v for v in range(10) if flat.count(v) == 1]
    absent = [v for v in range(10) if v not in flat]
    missing = absent and (not single or rng.random() < 1 / 6)
    wanted: int = pick(rng, absent if missing else single)
    asks = ("Where is the {}?", "Find the {}.", "In which row and column is the {}?")
    return Turn(pick(rng, asks).format(wanted), search(grid, wanted))


def search(grid: Grid, wanted: int) -> str:
    """Reads until the digit is found: `row 1: 3 5, row 2: 2: row 2, column 1`."""
    read = row_texts(grid)
    for row, line in enumerate(grid.values, 1):
        if wanted in line:
            column = line.index(wanted) + 1
            unread = 2 * (len(line) - column)  # a blank and a figure each
            last = read[row - 1][: len(read[row - 1]) - unread]
            return f"{', '.join([*read[: row - 1], last])}: row {row}, column {column}"
    return f"{rows_text(grid)}: nowhere"


def ask_odd(grid: Grid, rng: Rng) -> Turn:
    """Reads with a running count behind each row: `row 1: 3 5 (2 odd), row 2: 2 7 (3 odd)`."""
    asks = ("How many odd digits are there?", "Count the odd digits.", "How many digits are odd?")
    count, rows = 0, []
    for text, line in zip(row_texts(grid), grid.values, strict=True):
        count += sum(value % 2 for value in line)
        rows.append(f"{text} ({count} odd)")
    return Turn(pick(rng, asks), ", ".join(rows))


def added(terms: list[int]) -> str:
    """Adds from the left, one step at a time: `5 + 9 + 7 = 14 + 7 = 21`.

    A model this small adds two numbers reliably, not four at once.
    """
    steps = [terms]
    while len(terms) > 1:
        terms = [terms[0] + terms[1], *terms[2:]]
        steps.append(terms)
    return " = ".join(" + ".join(map(str, step)) for step in steps)


def ask_sum(grid: Grid, rng: Rng) -> Turn:
    asks = ("What is the sum of the digits?", "Add up the digits.", "Sum the digits.")
    return Turn(pick(rng, asks), added(grid.flat))


Ask = Callable[[Grid, Rng], Turn]
ASKS: dict[str, Ask] = {
    "read": ask_read,
    "describe": ask_describe,
    "where": ask_where,
    "odd": ask_odd,
    "sum": ask_sum,
}
Shapes = tuple[tuple[int, int], ...]
SHAPES = ((1, 2), (1, 3), (1, 4), (1, 5), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3))
SUM_SHAPES = ((1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1))


def digit(rng: Rng, held_out: bool) -> Sample:
    grid = draw_grid(rng, 1, 1, held_out)
    return Sample("digit", (ask_read(grid, rng),), (grid,))


def on_grid(task: str) -> Callable[[Rng, bool], Sample]:
    def make(rng: Rng, held_out: bool) -> Sample:
        shapes: Shapes = SUM_SHAPES if task == "sum" else SHAPES
        if task == "describe" and rng.random() < 0.2:
            shapes = ((1, 1),)
        grid = draw_grid(rng, *pick(rng, shapes), held_out)
        return Sample(task, (ASKS[task](grid, rng),), (grid,))

    return make


def two_images(rng: Rng, held_out: bool) -> Sample:
    grids = tuple(draw_grid(rng, 1, int(rng.integers(1, 4)), held_out) for _ in range(2))
    asks = ("Read both images.", "Which digits are in the first and in the second image?")
    answer = f"first: {rows_text(grids[0])}, second: {rows_text(grids[1])}"
    return Sample("two_images", (Turn(pick(rng, asks), answer),), grids)


def dialogue(rng: Rng, held_out: bool) -> Sample:
    """Two or three different questions on one grid."""
    grid = draw_grid(rng, *pick(rng, SUM_SHAPES), held_out)
    names = rng.permutation(list(ASKS))[: int(rng.integers(2, 4))]
    return Sample("dialogue", tuple(ASKS[name](grid, rng) for name in names), (grid,))


# --- text only -------------------------------------------------------------------------------


def classify(rng: Rng, held_out: bool) -> Sample:
    asks = (
        "Classify the text: {}",
        "Which topic is this? {}",
        "Sport, food, weather, music or travel? {}",
    )
    while True:
        topic = pick(rng, list(texts.TOPICS))
        text = pick(rng, texts.OPENINGS) + pick(rng, texts.SENTENCES).format(pick(rng, texts.TOPICS[topic]))
        if is_held_out(text) == held_out:
            return Sample("classify", (Turn(pick(rng, asks).format(text), topic),))


def draw_number(rng: Rng, held_out: bool) -> int:
    """All lengths get their share; everything up to 100 is for training."""
    while True:
        number = int(rng.integers(0, pick(rng, (100, 1000, numerals.LIMIT, numerals.LIMIT))))
        if (number > 100 and is_held_out(f"number {number}")) == held_out:
            return number


def to_chinese(rng: Rng, held_out: bool) -> Sample:
    asks = ("Translate to Chinese: {}", "How do you write {} in Chinese?", "翻译成中文：{}")
    number = draw_number(rng, held_out)
    question = pick(rng, asks).format(numerals.english(number))
    return Sample("to_chinese", (Turn(question, numerals.chinese(number)),))


def to_english(rng: Rng, held_out: bool) -> Sample:
    asks = ("Translate to English: {}", "What is {} in English?", "翻译成英文：{}")
    number = draw_number(rng, held_out)
    question = pick(rng, asks).format(numerals.chinese(number))
    return Sample("to_english", (Turn(question, numerals.english(number)),))


def add(rng: Rng, held_out: bool) -> Sample:
    """Two to four figures; every pair is for training."""
    asks = ("Add {}.", "What is {}?", "Work out {}.")
    while True:
        terms = [int(term) for term in rng.integers(0, 10, size=int(rng.integers(2, 5)))]
        written = " + ".join(map(str, terms))
        if (len(terms) > 2 and is_held_out(written)) == held_out:
            return Sample("add", (Turn(pick(rng, asks).format(written), added(terms)),))


def find(rng: Rng, held_out: bool) -> Sample:
    """The search of `where` in a written list: practice for it, cheaper than with an image."""
    asks = ("Find the {} in {}.", "Where is the {} in {}?")
    while True:
        figures = [int(n) for n in rng.integers(0, 10, size=int(rng.integers(3, 9)))]
        wanted = int(rng.choice(figures)) if rng.random() < 0.75 else int(rng.integers(10))
        listing = " ".join(map(str, figures))
        if is_held_out(f"{wanted} in {listing}") == held_out:
            break
    end = figures.index(wanted) + 1 if wanted in figures else 0
    seen = " ".join(map(str, figures[:end]))
    answer = f"{seen}: column {end}" if end else f"{listing}: nowhere"
    return Sample("find", (Turn(pick(rng, asks).format(wanted, listing), answer),))


def summarise(rng: Rng, held_out: bool) -> Sample:
    """Three to five things -> how many of each kind, in the order of mention."""
    asks = ("Summarise the list: {}.", "Summarise: {}.", "How many of each kind? {}.")
    while True:
        kinds = rng.permutation(list(texts.THINGS))[:2]
        drawn = [str(pick(rng, kinds)) for _ in range(int(rng.integers(3, 6)))]
        listing = ", ".join(pick(rng, texts.THINGS[kind]) for kind in drawn)
        if is_held_out(listing) == held_out:
            break
    answer = " and ".join(texts.counted(drawn.count(kind), kind) for kind in dict.fromkeys(drawn))
    return Sample("summarise", (Turn(pick(rng, asks).format(listing), answer),))


# Task -> (maker, weight in the training mix).
TASKS: dict[str, tuple[Callable[[Rng, bool], Sample], float]] = {
    "digit": (digit, 0.5),
    "read": (on_grid("read"), 1.2),
    "describe": (on_grid("describe"), 0.5),
    "where": (on_grid("where"), 4.0),
    "odd": (on_grid("odd"), 1.8),
    "sum": (on_grid("sum"), 1.8),
    "two_images": (two_images, 0.5),
    "dialogue": (dialogue, 1.8),
    "classify": (classify, 0.4),
    "to_chinese": (to_chinese, 0.5),
    "to_english": (to_english, 0.4),
    "add": (add, 1.2),
    "find": (find, 2.5),
    "summarise": (summarise, 0.6),
}


def draw(rng: Rng, held_out: bool = False) -> Sample:
    """A sample of the training mix."""
    weights = np.array([weight for _, weight in TASKS.values()])
    name = list(TASKS)[int(rng.choice(len(weights), p=weights / weights.sum()))]
    return TASKS[name][0](rng, held_out)
