"""Types of the command line's options; a wrong value is told as everywhere: its name, the value, what is allowed."""

import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from moevlm.runtime.core.errors import refusal


class _Type(click.ParamType):
    def refuse(self, value: object, allowed: str, param: click.Parameter | None, ctx: click.Context | None) -> NoReturn:
        name = max(param.opts, key=len) if param is not None else self.name
        raise click.UsageError(refusal(name, value, allowed), ctx)


class WholeNumber(_Type):
    """From `least` to `most`, without a limit where that is None."""

    name = "integer"

    def __init__(self, least: int | None = None, most: int | None = None) -> None:
        self.least, self.most = least, most

    @property
    def allowed(self) -> str:
        """For a message."""
        if self.least is None:
            return "a whole number"
        return f"a whole number, {self.least} or more" if self.most is None else self._range

    @property
    def _range(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,1000}", value):
            value = int(value)
        if not isinstance(value, int):
            self.refuse(value, self.allowed, param, ctx)
        if (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
            self.refuse(value, self.allowed, param, ctx)
        return value


class Number(_Type):
    """A number, also inf and nan; what they are good for is checked where they are used."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(value)
        except ValueError:
            self.refuse(value, "a number", param, ctx)


class OneOf(click.Choice[str], _Type):
    """One of some words."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.refuse(value, ", ".join(self.choices), param, ctx)


class Size(_Type):
    """A number of bytes, such as 800M or 1.5G, in powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([KMGT]?)(?:i?B)?", value, re.IGNORECASE)
        size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) if found else 0
        if size < 1:
            self.refuse(value, "a size, such as 800M or 1.5G", param, ctx)
        return size


class InputFile(click.File):
    """A file of bytes, or - for standard input, which may be closed."""

    name = "file"

    def __init__(self) -> None:
        super().__init__("rb")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "-" and sys.stdin is None:
            self.fail("standard input is closed: nothing can be read from it", param, ctx)
        return super().convert(value, param, ctx)


class OutputFile(click.Path):
    """A file to be written at the end; whether that is possible is found out at the start."""

    name = "file"

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, allow_dash=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        new = str(path) != "-" and not os.path.exists(path)  # noqa: PTH110 - Path.exists raises for a name too long
        if new and not os.access(path.parent, os.W_OK):
            self.fail(f"{str(path.parent)!r} is not a directory that can be written to", param, ctx)
        return path
