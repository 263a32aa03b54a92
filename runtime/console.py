"""How the commands talk to people: tables, sizes, and progress on standard error."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def console(stderr: bool = False) -> Console:
    """A console; progress and notes go to standard error, results to standard output."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], header: bool = True) -> Table:
    """A plain table; columns after the first that hold numbers read best right-aligned, so they are where they fit."""
    result = Table(title=title, title_justify="left", show_header=header, box=None, pad_edge=False, padding=(0, 2))
    for column in columns:
        result.add_column(column)
    for row in rows:
        result.add_row(*row)
    return result


def bytes_text(count: int) -> str:
    """A size for people: 9.9 MB, 4.3 GB (powers of 1000)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) that shows one bar per `what`; without a terminal, one line when it starts."""
    terminal = console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    tasks: dict[str, int] = {}
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bars:

        def show(what: str, done: int = 0, total: int = 0) -> None:
            if what not in tasks:
                for earlier in tasks.values():
                    bars.update(earlier, total=1, completed=1)
                tasks[what] = bars.add_task(what, total=total or None)
                if not terminal.is_terminal:
                    terminal.print(what)
            bars.update(tasks[what], completed=done, total=total or None)

        yield show
        for task in tasks.values():
            bars.update(task, total=1, completed=1)
