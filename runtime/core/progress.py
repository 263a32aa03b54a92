"""What long work tells of itself while it runs."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, in total): bytes, layers or steps; 0 and 0 where there is no measure
Stages = Callable[[str, int, int], None]  # (what is being done, done, in total)


def silent(*_: object) -> None:
    """Tell nobody."""
