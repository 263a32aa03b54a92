"""How the commands talk to people: tables, sizes, files of results, and progress on standard error."""

import re
import textwrap
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.printable import bytes_text, printable
from moevlm.runtime.core.progress import Stages

_NUMBER = re.compile(r"(-?\d[\d.]*(e[-+]?\d+)?|-?inf|nan)( ?[\w/%]+)?|-|")  # with a unit, if any; or none
_NOTICE_SECONDS = 1.0
_LINE_SECONDS = 15.0  # between two lines of one stage where there is no terminal
_COUNTS = 10_000
_LEAST_COLUMN = 24  # cells, in which a text can still be read
_KEPT = "\ue000"  # in the place of a space at which no line ends


class _Console(Console):
    """Prints text of bundles and checkpoints, in which a terminal must find nothing to obey."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(part) if isinstance(part, str) else part for part in objects), **options)


def console(stderr: bool = False) -> Console:
    """A console; progress and notes go to standard error, results to standard output."""
    # Text is printed as it is: a path may well hold [brackets].
    return _Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], header: bool = True) -> str:
    """A plain table under its title; columns of numbers are aligned on the right.

    It is as wide as it needs to be. What is too wide for a terminal is folded there: the last column's texts, or, where
    there is no room for these, every row into words of its own.
    """
    body = [[printable(cell) for cell in row] for row in rows]
    lines = [list(columns), *body] if header else body
    widths = [max((cell_len(line[i]) for line in lines), default=0) for i in range(len(columns))]
    room = _terminal_width()
    if room is not None and sum(widths) + 2 * len(widths) - 2 > room:
        left = room - sum(widths[:-1]) - 2 * (len(widths) - 1)
        if left < _LEAST_COLUMN:
            return "\n".join([title, *(_in_words(columns, row) for row in body)])
        body = [line for row in body for line in _folded(row, left)]
        lines = [list(columns), *body] if header else body
        widths[-1] = left
    numeric = [bool(body) and all(_NUMBER.fullmatch(row[i]) for row in body) for i in range(len(columns))]

    def pad(cell: str, width: int, right: bool) -> str:
        space = " " * (width - cell_len(cell))
        return space + cell if right else cell + space

    texts = ["  ".join(map(pad, line, widths, numeric)).rstrip() for line in lines]
    return "\n".join([title, *texts])


def folded(text: str, indent: str) -> str:
    """A text as lines that fit a terminal, all but the first behind `indent`; in one line where there is none."""
    width = _terminal_width()
    if width is None:
        return text
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _terminal_width() -> int | None:
    """Of standard output; None where that is no terminal, and lines may have any length."""
    screen = console()
    return screen.width if screen.is_terminal else None


def _folded(row: list[str], width: int) -> Iterator[list[str]]:
    """Lines of a row whose last text has up to so many cells a line."""
    first, *others = textwrap.wrap(row[-1], width, break_on_hyphens=False) or [""]
    yield [*row[:-1], first]
    yield from ([""] * (len(row) - 1) + [text] for text in others)


def _in_words(columns: Sequence[str], row: Sequence[str]) -> str:
    """cpu:int8: size 138.1 kB, parity not checked"""
    cells = (cell.replace(" ", _KEPT) if len(cell) < _LEAST_COLUMN else cell for cell in row[1:])
    facts = (f"{head} {cell}".strip() for head, cell in zip(columns[1:], cells, strict=True) if cell not in ("", "-"))
    indent = " " * (len(row[0]) - len(row[0].lstrip()) + 2)
    text = f"{row[0]}: {', '.join(facts)}"
    return folded(text, indent).replace(_KEPT, " ")


@contextmanager
def progress_bar() -> Iterator[Stages]:
    """A function (what, done, total) that shows one bar per `what`; without a terminal, lines in place of bars.

    Totals below _COUNTS are numbers of things, as layers or repeats, others are bytes.
    """
    terminal = console(stderr=True)
    if not terminal.is_terminal:
        yield _Lines(terminal).show
        return
    tasks: dict[str, TaskID] = {}
    with _bars(terminal) as bars:

        def show(what: str, done: int = 0, total: int = 0) -> None:
            if what not in tasks:
                for earlier in tasks.values():
                    bars.update(earlier, total=1, completed=1)
                tasks[what] = bars.add_task(printable(what), total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield show
        for task in tasks.values():
            bars.update(task, total=1, completed=1)


@contextmanager
def notice() -> Iterator[Stages]:
    """Like `progress_bar`, for what is mostly quick: seen on a terminal only, after a second, and wiped at the end."""
    terminal = console(stderr=True)
    bars = _bars(terminal, transient=True)
    task = bars.add_task("", total=None)

    def show(what: str, done: int = 0, total: int = 0) -> None:
        bars.update(task, description=printable(what), completed=done, total=total or None)

    appear = threading.Timer(_NOTICE_SECONDS, bars.start)
    appear.daemon = True
    if not terminal.is_terminal:
        yield show
        return
    appear.start()
    try:
        yield show
    finally:
        appear.cancel()
        appear.join()
        if bars.live.is_started:
            bars.stop()


def print_json(text: str) -> None:
    """Print JSON as UTF-8, whatever the terminal's encoding: a program reads it."""
    click.echo(text.encode())


def publish(shown: str, json_text: str, output: Path | None) -> None:
    """Print the results for people, and write them as JSON to `output`; with "-", print the JSON and nothing else.

    Raises RequestError if the file cannot be written.
    """
    if str(output) == "-":
        print_json(json_text)
        return
    console().print(shown)
    if output is None:
        return
    try:
        output.write_text(json_text + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {output}: {error.strerror}") from error
    console().print(f"written: {output}")


class _Lines:
    """A line when a stage starts, and, while it goes on, one in a while that says how far it is."""

    def __init__(self, terminal: Console) -> None:
        self._terminal = terminal
        self._said: dict[str, float] = {}  # when, by stage
        self._began = 0.0

    def show(self, what: str, done: int = 0, total: int = 0) -> None:
        now = monotonic()
        if what not in self._said:
            self._began = self._said[what] = now
            self._terminal.print(what)
        elif total and now - self._said[what] >= _LINE_SECONDS:
            self._said[what] = now
            seconds = now - self._began
            left = seconds / done * (total - done) if done else 0.0
            self._terminal.print(f"{what}: {amount_text(done, total, done / seconds)}, {left:.0f} s left")


def amount_text(done: float, total: float, speed: float | None = None) -> str:
    """The progress of a stage: 12 % (1.2 of 9.9 GB, 350.0 MB/s), or 25 % (3 of 12)."""
    if total < _COUNTS:
        return f"{done / total:.0%} ({done:.0f} of {total:.0f})"
    rate = f", {bytes_text(int(speed))}/s" if speed else ""
    return f"{done / total:.0%} ({bytes_text(int(done))} of {bytes_text(int(total))}{rate})"


class _Amount(ProgressColumn):
    """Percent, amount, rate and time left of a stage whose end is known."""

    def render(self, task: Task) -> Text:
        if not task.total or task.finished:
            return Text("")
        left = f", {task.time_remaining:.0f} s left" if task.time_remaining is not None else ""
        return Text(amount_text(task.completed, task.total, task.speed) + left)


def _bars(terminal: Console, transient: bool = False) -> Progress:
    name = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), name, BarColumn(), TimeElapsedColumn(), _Amount())
    return Progress(*columns, console=terminal, transient=transient)
