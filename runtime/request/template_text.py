"""Text that remembers which of its characters the chat template wrote, through what templates do to text.

Whatever is not known to be the template's own counts as a message's. An operation that is not listed here loses the
template's marks, and can never give one to the text of a message.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any


class MarkedText(str):
    """A str with a byte for each character: 1 if the template wrote it, 0 if it came with a message.

    Python's own methods return plain str, which has no marks.
    """

    marks: bytes

    def __new__(cls, text: str = "", marks: bytes | None = None) -> MarkedText:
        made = super().__new__(cls, text)
        made.marks = bytes(len(text)) if marks is None else marks
        return made

    def __str__(self) -> str:
        return self

    @cached_property
    def is_own(self) -> bool:
        return 0 not in self.marks


def own(text: str) -> MarkedText:
    """text as the template's own."""
    return MarkedText(text, b"\1" * len(text))


def is_own(text: str) -> bool:
    """Tell whether the template wrote all of it."""
    return not text or (isinstance(text, MarkedText) and text.is_own)


def marks_of(text: str) -> bytes:
    return text.marks if isinstance(text, MarkedText) else bytes(len(text))


def concatenate(pieces: Iterable[str]) -> str:
    pieces = list(pieces)
    text = "".join(pieces)
    if not any(isinstance(piece, MarkedText) for piece in pieces):
        return text
    return MarkedText(text, b"".join(map(marks_of, pieces)))


def cut(text: str, at: slice) -> str:
    return MarkedText(str.__getitem__(text, at), text.marks[at]) if isinstance(text, MarkedText) else text[at]


def character(text: str, at: int) -> str:
    return MarkedText(str.__getitem__(text, at), bytes([text.marks[at]])) if isinstance(text, MarkedText) else text[at]


def _strip(text: str, chars: str | None = None) -> str:
    start = len(text) - len(text.lstrip(chars))
    return cut(text, slice(start, start + len(text.strip(chars))))


def _lstrip(text: str, chars: str | None = None) -> str:
    return cut(text, slice(len(text) - len(text.lstrip(chars)), None))


def _rstrip(text: str, chars: str | None = None) -> str:
    return cut(text, slice(0, len(text.rstrip(chars))))


def _removeprefix(text: str, prefix: str) -> str:
    return cut(text, slice(len(text) - len(text.removeprefix(prefix)), None))


def _removesuffix(text: str, suffix: str) -> str:
    return cut(text, slice(0, len(text.removesuffix(suffix))))


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    return _located(text, text.split(sep, maxsplit), len(sep) if sep else None)


def _rsplit(text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    return _located(text, text.rsplit(sep, maxsplit), len(sep) if sep else None)


def _splitlines(text: str, keepends: bool = False) -> list[str]:
    return _located(text, text.splitlines(keepends), 0 if keepends else None)


def _partition(text: str, sep: str) -> tuple[str, ...]:
    return tuple(_located(text, text.partition(sep), 0))


def _rpartition(text: str, sep: str) -> tuple[str, ...]:
    return tuple(_located(text, text.rpartition(sep), 0))


def _located(text: str, pieces: Iterable[str], gap: int | None) -> list[str]:
    """Pieces of a text in order, with their marks. gap: characters between two of them; None: any number of blanks."""
    if not isinstance(text, MarkedText):
        return list(pieces)
    found, at = [], 0
    for piece in pieces:
        start = text.index(piece, at) if gap is None else at
        found.append(cut(text, slice(start, start + len(piece))))
        at = start + len(piece) + (gap or 0)
    return found


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    if old:
        return _join(new, _split(text, old, count))
    made = text.replace(old, new, count)
    return own(made) if is_own(text) and is_own(new) else made


def _join(separator: str, pieces: Iterable[str]) -> str:
    return concatenate([part for piece in pieces for part in (separator, piece)][1:])


def _cased(method: Any) -> Any:
    def change(text: str) -> str:
        made: str = method(text)
        same = isinstance(text, MarkedText) and len(made) == len(text)
        return MarkedText(made, marks_of(text)) if same else made

    return change


METHODS = {
    "strip": _strip,
    "lstrip": _lstrip,
    "rstrip": _rstrip,
    "removeprefix": _removeprefix,
    "removesuffix": _removesuffix,
    "split": _split,
    "rsplit": _rsplit,
    "splitlines": _splitlines,
    "partition": _partition,
    "rpartition": _rpartition,
    "replace": _replace,
    "join": _join,
    **{name: _cased(getattr(str, name)) for name in ("lower", "upper", "title", "capitalize", "swapcase", "casefold")},
}
