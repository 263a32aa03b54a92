"""The tasks are right by construction: answers recomputed here, independently."""

import re

import numpy as np
import pytest

from demo import digits, images, numerals, tasks, texts

NUMBERS = {
    0: ("zero", "零"),
    10: ("ten", "十"),
    12: ("twelve", "十二"),
    20: ("twenty", "二十"),
    45: ("forty-five", "四十五"),
    100: ("one hundred", "一百"),
    105: ("one hundred and five", "一百零五"),
    110: ("one hundred and ten", "一百一十"),
    1005: ("one thousand and five", "一千零五"),
    1010: ("one thousand and ten", "一千零一十"),
    1100: ("one thousand one hundred", "一千一百"),
    2030: ("two thousand and thirty", "二千零三十"),
    7305: ("seven thousand three hundred and five", "七千三百零五"),
    9999: ("nine thousand nine hundred and ninety-nine", "九千九百九十九"),
}


def chinese_value(text: str) -> int:
    total, figure = 0, 0
    for char in text:
        if char in "十百千":
            total += max(figure, 1) * {"十": 10, "百": 100, "千": 1000}[char]
            figure = 0
        else:
            figure = "零一二三四五六七八九".index(char)
    return total + figure


def draws(task: str, held_out: bool, count: int = 60) -> list[tasks.Sample]:
    rng = np.random.default_rng(5)
    return [tasks.TASKS[task][0](rng, held_out) for _ in range(count)]


@pytest.mark.parametrize("number", NUMBERS)
def test_number_words_have_their_known_values(number):
    assert (numerals.english(number), numerals.chinese(number)) == NUMBERS[number]


def test_number_words_are_distinct_and_chinese_reads_back():
    numbers = range(numerals.LIMIT)
    assert len({numerals.english(n) for n in numbers}) == numerals.LIMIT
    assert all(chinese_value(numerals.chinese(n)) == n for n in numbers)


def test_held_out_digits_are_disjoint_from_training():
    train, held_out = digits.indices(False), digits.indices(True)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == len(digits.load()[1])
    assert 0.15 < len(held_out) / len(digits.load()[1]) < 0.25


@pytest.mark.parametrize("held_out", [False, True])
def test_samples_draw_only_from_their_split(held_out):
    allowed = set(digits.indices(held_out).tolist())
    for task in ("digit", "read", "two_images", "dialogue"):
        for sample in draws(task, held_out):
            used = {i for grid in sample.grids for row in grid.sources for i in row}
            assert used <= allowed


@pytest.mark.parametrize("task", ["classify", "to_chinese", "to_english", "summarise", "add", "find"])
def test_held_out_texts_never_occur_in_training(task):
    def contents(held_out: bool) -> set[str]:
        samples = draws(task, held_out, 400)
        turns = [sample.turns[0] for sample in samples]
        if task == "classify":
            return {re.split(r"(?:text:|this\?|travel\?) ", t.question)[1] for t in turns}
        if task == "summarise":
            return {re.search(r"\w+, .*", t.question)[0] for t in turns}
        if task == "find":
            return {re.search(r"\d in \d[\d ]+\d", t.question)[0] for t in turns}
        if task == "add":
            return {re.search(r"\d[\d +]+\d", t.question)[0] for t in turns}
        return {re.search("[零一二三四五六七八九十百千]+", t.question + t.answer)[0] for t in turns}

    assert not contents(False) & contents(True)


def test_grid_answers_agree_with_the_digits():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, cols = (int(n) for n in rng.integers(1, 4, size=2))
        grid = images.draw_grid(rng, rows, cols, held_out=False)
        labels = digits.load()[1][np.array(grid.sources)]
        read = tasks.ask_read(grid, rng).answer
        if rows > 1:
            assert [int(n) for n in re.findall(r"row (\d)", read)] == list(range(1, rows + 1))
        figures = [int(n) for n in re.findall(r"\d", re.sub(r"row \d", "", read))]
        assert figures == labels.flatten().tolist()
        assert_adds_up(tasks.ask_sum(grid, rng).answer, labels.flatten().tolist())
        running = [int(n) for n in re.findall(r"\((\d) odd\)", tasks.ask_odd(grid, rng).answer)]
        assert running == (labels % 2).sum(axis=1).cumsum().tolist()
        turn = tasks.ask_where(grid, rng)
        wanted = int(re.search(r"\d", turn.question)[0])
        places = np.argwhere(labels == wanted)
        if len(places) == 0:
            assert turn.answer == f"{read}: nowhere"
        else:
            ((row, column),) = places + 1
            seen = turn.answer.removesuffix(f": row {row}, column {column}")
            assert seen != turn.answer and read.startswith(seen) and seen.endswith(str(wanted))


def assert_adds_up(answer: str, terms: list[int]) -> None:
    steps = [[int(term) for term in step.split(" + ")] for step in answer.split(" = ")]
    assert steps[0] == terms
    assert [len(step) for step in steps] == list(range(len(terms), 0, -1))
    assert {sum(step) for step in steps} == {sum(terms)}


def test_find_stops_at_the_first_hit():
    for sample in draws("find", held_out=False):
        wanted, listing = re.search(r"(\d) in (\d[\d ]+\d)", sample.turns[0].question).groups()
        column = listing.split().index(wanted) + 1 if wanted in listing else 0
        seen = " ".join(listing.split()[:column])
        assert sample.turns[0].answer == (f"{seen}: column {column}" if column else f"{listing}: nowhere")


def test_addition_of_the_figures_in_the_question():
    for sample in draws("add", held_out=True):
        terms = [int(figure) for figure in re.findall(r"\d", sample.turns[0].question)]
        assert_adds_up(sample.turns[0].answer, terms)


def test_summary_counts_each_kind():
    kind_of = {thing: kind for kind, things in texts.THINGS.items() for thing in things}
    for sample in draws("summarise", held_out=False, count=200):
        listed = [kind_of[word] for word in re.findall(r"\w+", sample.turns[0].question) if word in kind_of]
        said = re.findall(r"(\d) (\w+?)s?\b", sample.turns[0].answer)
        assert {kind: int(count) for count, kind in said} == {kind: listed.count(kind) for kind in listed}
        assert [kind for _, kind in said] == list(dict.fromkeys(listed))


def test_render_is_repeatable_and_whole_cells():
    grid = images.draw_grid(np.random.default_rng(1), 2, 3, held_out=True)
    one, two = (images.render(grid, np.random.default_rng(2)) for _ in range(2))
    assert one.shape == (2 * images.CELL, 3 * images.CELL, 3) and one.dtype == np.uint8
    assert np.array_equal(one, two)
