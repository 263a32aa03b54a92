"""Text of others (a bundle's, a checkpoint's, a library's) made fit for a terminal, and sizes for people."""

import re
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import TextIO

MOST_CHARACTERS = 2000
# Control characters but tab and newline; what turns the direction of writing around; halves of surrogate pairs, which
# are the bytes of paths that are not UTF-8.
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with every character that a terminal would obey, or cannot show, as \\x1b."""
    return UNFIT.sub(lambda found: found[0].encode("unicode_escape", "backslashreplace").decode(), text)


def message_line(text: str) -> str:
    """A message as a single line of at most some thousand characters; of a longer one the middle is left out."""
    line = " ".join(text.splitlines())
    if len(line) > MOST_CHARACTERS:
        head, tail = MOST_CHARACTERS * 2 // 3, MOST_CHARACTERS // 3
        line = f"{line[:head]} [... {len(line) - head - tail} characters ...] {line[-tail:]}"
    return printable(line)


def escape_unencodable(stream: TextIO | None) -> None:
    """Let a stream write characters that its encoding lacks as \\u5929, where it would raise."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def in_shell(path: str | Path) -> str:
    """The path as a word of a command line that is suggested."""
    return quote(str(path))


def counted(count: int, noun: str) -> str:
    """1 tensor, 2 tensors"""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def stored_text(stored_as: Mapping[str, int]) -> str:
    """7 tensors fp8 in blocks of 128 x 128, 5 bfloat16"""
    first, *others = stored_as.items()
    return ", ".join([f"{counted(first[1], 'tensor')} {first[0]}", *(f"{count} {name}" for name, count in others)])


def bytes_text(count: int) -> str:
    """A size for people: 9.9 MB, 4.3 GB (powers of 1000)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def count_text(count: int) -> str:
    """A number of parameters for people: 31 thousand, 4.9 million, 30.5 billion."""
    for size, unit in ((10**9, "billion"), (10**6, "million"), (1000, "thousand")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def recoded_text(recoded: Mapping[str, int], errors: Mapping[str, float] = MappingProxyType({})) -> str:
    """What became of weights in codes, see `EngineMetadata`: 96 int4 kept, 2 fp4 to int8 (weight error 0.62 %)."""
    told = {fate: f" (weight error {100 * error:.2g} %)" for fate, error in errors.items()}
    return ", ".join(f"{count} {fate}{told.get(fate, '')}" for fate, count in recoded.items())
