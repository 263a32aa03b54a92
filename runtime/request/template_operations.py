"""What a chat template does to text, within its budget: what is made keeps the marks of the template's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import jinja2.filters
from jinja2.exceptions import SecurityError

from moevlm.runtime.request import template_text
from moevlm.runtime.request.template_budget import Budget
from moevlm.runtime.request.template_text import MarkedText, concatenate, is_own, own

MAX_WIDTH = 1000  # of an indentation, or of a padded number or text
_ASKED = (
    *("count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier"),
    *("islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "rfind", "rindex", "startswith"),
)
_CUTS = ("split", "rsplit", "splitlines")
_PADDED = ("center", "ljust", "rjust", "zfill")


class TextOperations:
    """Operators, filters and methods of text, for one rendering. Strings that the template writes are MarkedText."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._literals: dict[str, MarkedText] = {}

    def literal(self, text: str) -> MarkedText:
        found = self._literals.get(text)
        if found is None:
            found = self._literals[text] = own(text)
        return found

    def string(self, value: Any) -> str:
        """str(value); numbers, true, false and none are the template's own words."""
        if isinstance(value, str):
            return value
        extent = self.budget.extent(value)
        self.budget.make(12 * extent.size)  # each character may be escaped
        text = str(value)
        return own(text) if value is None or isinstance(value, (int, float)) or (extent.depth and extent.own) else text

    def concat(self, pieces: Iterable[str]) -> str:
        pieces = list(pieces)
        self.budget.step(1 + len(pieces) // 8)
        self.budget.make(sum(map(len, pieces)))
        return concatenate(pieces)

    def tilde(self, values: Iterable[Any]) -> str:
        return self.concat([self.string(value) for value in values])

    def filter(self, method: str, value: Any, *args: Any, **values: Any) -> Any:
        """A filter of the same name as a method."""
        return self.method(method, self.string(value), *args, **values)

    def replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> Any:
        return self.filter("replace", value, self.string(old), self.string(new), -1 if count is None else count)

    def method(self, name: str, text: str, *args: Any, **values: Any) -> Any:
        """text.name(*args, **values). Raises SecurityError for a method that is on no list."""
        for value in (text, *args, *values.values()):
            self.budget.touch(value)
        if name == "join":
            return self.join(args[0], text)
        if name in _ASKED:
            return getattr(str, name)(text, *args, **values)
        if name in _PADDED:
            _require_width(args[0])
            self.budget.make(max(len(text), args[0]))
            made = getattr(str, name)(text, *args)
            return own(made) if all(is_own(part) for part in (text, *args[1:])) else made
        if name not in template_text.METHODS:
            raise SecurityError(f"text.{name} may not be called")
        if name == "replace":
            old, new = (*args, values.get("old"), values.get("new"))[:2] if len(args) < 2 else args[:2]
            self.budget.make(len(text) + text.count(old) * len(new))
        if name in _CUTS:  # plain strings are quick: what marked ones cost is known before they are made
            self.budget.make(self.budget.extent(getattr(str, name)(text, *args, **values)).size)
            return template_text.METHODS[name](text, *args, **values)
        result = template_text.METHODS[name](text, *args, **values)
        self.budget.make(self.budget.extent(result).size)
        return result

    def join(self, values: Iterable[Any], separator: str = "") -> str:
        pieces = [self.string(value) for value in self.budget.counted(values)]
        self.budget.make(len(separator) * len(pieces))
        return self.concat([part for piece in pieces for part in (separator, piece)][1:])

    def indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self.string(value)
        _require_width(len(width) if isinstance(width, str) else width)
        self.budget.make(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
        made = jinja2.filters.do_indent(str.__str__(text), width, first, blank)
        return own(made) if is_own(text) and (not isinstance(width, str) or is_own(width)) else made

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which no model was trained on.
        width = len(indent) if isinstance(indent, str) else indent or 0
        _require_width(width)
        extent = self.budget.extent(value)
        between = sum(map(len, separators)) if separators else 4
        self.budget.make(extent.size * (12 + between + width * extent.depth))
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return own(text) if extent.own else text

    def percent(self, form: str, values: Any) -> str:
        if re.search(r"[*]|\d{4}", form):
            raise SecurityError(f"a format may pad to {MAX_WIDTH - 1} characters at most")
        extent = self.budget.extent(values)
        self.budget.make(len(form) + form.count("%") * (MAX_WIDTH + 12 * extent.size))
        made = str.__mod__(form, values)
        return own(made) if is_own(form) and extent.own else made


def _require_width(width: int) -> None:
    if width > MAX_WIDTH:
        raise SecurityError(f"a width may be {MAX_WIDTH} at most, not {width}")
