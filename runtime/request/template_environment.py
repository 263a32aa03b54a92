"""Jinja's sandbox for chat templates: closed lists of what may be called, a budget, and text that keeps its marks."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from types import BuiltinMethodType, CodeType, MethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.tests
import jinja2.utils
from jinja2.exceptions import SecurityError

from moevlm.runtime.core.errors import BundleError
from moevlm.runtime.request import template_text
from moevlm.runtime.request.template_budget import CHARACTERS_OF_AN_ELEMENT, Budget
from moevlm.runtime.request.template_code import Compiler
from moevlm.runtime.request.template_text import MarkedText, concatenate, is_own, own

MAX_WIDTH = 1000  # of an indentation, or of a padded number or text
# Jinja's filters that look at no more than the value itself, or at one element.
_QUICK = ("abs", "count", "d", "default", "first", "float", "int", "items", "last", "length", "list")
_SLOW = (
    *("dictsort", "groupby", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort"),
    *("title", "unique"),
)
_TEXT = ("capitalize", "lower", "upper")  # as the methods of the same names
_QUICK_TESTS = (
    *("boolean", "callable", "defined", "divisibleby", "even", "false", "float", "integer", "iterable", "mapping"),
    *("none", "number", "odd", "sameas", "sequence", "string", "true", "undefined"),
)
_SLOW_TESTS = ("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan")
_ASKED = (
    *("count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier"),
    *("islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "rfind", "rindex", "startswith"),
)
_CUTS = ("split", "rsplit", "splitlines")
_PADDED = ("center", "ljust", "rjust", "zfill")
_COLLECTIONS = ("count", "get", "index", "items", "keys", "values")


class Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; here it only contains them."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it on the instance)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """Attributes that start with an underscore are Python's, and closed to a template."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds may hold it


class Undefined(jinja2.Undefined):
    """May be tested, as templates do, but not printed: "" in its place would be a prompt nobody was trained on."""

    def __init__(
        self,
        hint: str | None = None,
        obj: Any = jinja2.utils.missing,
        name: str | None = None,
        exc: type[Exception] = jinja2.UndefinedError,
    ) -> None:
        # A variable is the template's own mistake; a missing element may be the messages'.
        super().__init__(hint, obj, name, BundleError if obj is jinja2.utils.missing else exc)  # type: ignore[arg-type]

    def __str__(self) -> str:
        raise BundleError(self._undefined_message)


class ChatEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """For one rendering, or for compiling. Strings that the template itself writes are MarkedText, others are not."""

    code_generator_class = Compiler
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    context: jinja2.runtime.Context  # of the rendering

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=Undefined,
            extensions=[Generation, jinja2.ext.loopcontrols],
            finalize=_printed,
            optimized=False,  # nothing is computed while a template is compiled
        )
        self.budget = budget
        self._literals: dict[str, MarkedText] = {}
        known = jinja2.filters.FILTERS
        self.filters = {
            **{name: partial(self._filtered, known[name], False) for name in _QUICK},
            **{name: partial(self._filtered, known[name], True) for name in _SLOW},
            **{name: partial(self._text_filter, name) for name in _TEXT},
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "safe": self.string,
            "string": self.string,
            "tojson": self._tojson,
            "trim": partial(self._text_filter, "strip"),
        }
        self.tests = {
            **{name: jinja2.tests.TESTS[name] for name in _QUICK_TESTS},
            **{name: self._tested(jinja2.tests.TESTS[name]) for name in _SLOW_TESTS},
        }
        self._functions: dict[str, Callable[..., Any]] = {
            "dict": lambda *pairs, **values: self.made(dict(*pairs, **values)),
            "namespace": self._namespace,
            "raise_exception": self._raise_exception,
            "range": jinja2.sandbox.safe_range,
            "strftime_now": _strftime_now,
        }
        self.globals.clear()
        self.globals.update(self._functions)

    def run(self, code: CodeType, variables: dict[str, Any]) -> Iterator[str]:
        """The pieces of a rendered template."""
        template = self.template_class.from_code(self, code, self.globals)
        self.context = template.new_context(variables)
        return template.root_render_func(self.context)

    # What the compiled template calls.

    def literal(self, text: str) -> MarkedText:
        found = self._literals.get(text)
        if found is None:
            found = self._literals[text] = own(text)
        return found

    def made(self, value: Any) -> Any:
        """A list, tuple or dict that was just made."""
        self.budget.extent(value)
        self.budget.make(CHARACTERS_OF_AN_ELEMENT * (len(value) + 1))
        for key in value if isinstance(value, dict) else ():
            if isinstance(key, tuple):
                self.budget.touch(key)  # it was hashed
        return value

    def touched(self, value: Any) -> Any:
        """A value that is about to be compared."""
        self.budget.touch(value)
        return value

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the items of a loop, a step for each."""
        for item in items:
            self.budget.step()
            yield item

    def tilde(self, values: Iterable[Any]) -> str:
        return self.concat([self.string(value) for value in values])

    def concat(self, pieces: Iterable[str]) -> str:
        pieces = list(pieces)
        self.budget.step(1 + len(pieces) // 8)
        self.budget.make(sum(map(len, pieces)))
        return concatenate(pieces)

    def string(self, value: Any) -> str:
        """str(value); numbers, true, false and none are the template's own words."""
        if isinstance(value, str):
            return value
        extent = self.budget.extent(value)
        self.budget.make(12 * extent.size)  # each character may be escaped
        text = str(value)
        return own(text) if value is None or isinstance(value, (int, float)) or (extent.depth and extent.own) else text

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, slice):
            self.budget.step()
            self.budget.make(len(obj) * (1 if isinstance(obj, str) else CHARACTERS_OF_AN_ELEMENT))
            return template_text.cut(obj, argument) if isinstance(obj, str) else obj[argument]
        if isinstance(argument, tuple):
            self.budget.touch(argument)
        if isinstance(obj, MarkedText) and isinstance(argument, int) and -len(obj) <= argument < len(obj):
            return template_text.character(obj, argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> None:  # noqa: ARG002 - Jinja's signature
        return None  # `call` knows no format

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return self.concat((left, right))
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        sequences: list[Any] = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.budget.bits(left.bit_length() * right)
        elif operator == "*" and sequences:
            times = right if sequences[0] is left else left
            self.budget.make(times * self.budget.extent(sequences[0]).size if isinstance(times, int) else 0)
        elif operator == "+":
            self.budget.make(sum(self.budget.extent(value).size for value in sequences))
        result = super().call_binop(context, operator, left, right)
        self.budget.extent(result)
        return own(result) if isinstance(result, str) and is_own(sequences[0]) else result

    def call(self, context: Any, function: Any, /, *args: Any, **values: Any) -> Any:
        self.budget.step(4)  # what a macro takes
        for name in ("_loop_vars", "_block_vars"):  # for functions that are given the context, which these are not
            values.pop(name, None)
        for value in chain(args, values.values()):  # a macro gets them as lists
            self.budget.extent(value)
        if isinstance(function, BuiltinMethodType):
            owner, name = function.__self__, function.__name__
            if isinstance(owner, str):
                return self._text_method(name, owner, *args, **values)
            if isinstance(owner, (list, tuple, dict)) and name in _COLLECTIONS:
                for value in (*args, owner if name in ("count", "index") else None):
                    self.budget.touch(value)
                result = function(*args, **values)
                return self.made(list(result)) if name in ("items", "keys", "values") else result
        elif isinstance(function, jinja2.runtime.LoopContext):
            return function(list(self.counted(args[0])))
        elif isinstance(function, jinja2.runtime.Macro) or any(function is one for one in self._functions.values()):
            return context.call(function, *args, **values)
        elif isinstance(function, MethodType) and isinstance(function.__self__, jinja2.runtime.LoopContext):
            for value in args:
                self.budget.touch(value)
            return context.call(function, *args, **values)  # cycle and changed
        elif isinstance(function, jinja2.Undefined):
            return function()  # raises what it stands for
        raise SecurityError(f"{getattr(function, '__name__', type(function).__name__)} may not be called")

    # Filters, tests, methods and functions.

    def _filtered(self, function: Callable[..., Any], slow: bool, value: Any, *args: Any, **values: Any) -> Any:
        for one in (value, *args, *values.values()) if slow else ():
            self.budget.touch(one)
        self.budget.step()
        passed = jinja2.utils._PassArg.from_obj(function)
        if passed is not None:
            first = {"context": self.context, "eval_context": self.context.eval_ctx, "environment": self}
            args = (value, *args)
            result = function(first[passed.name], *args, **values)
        else:
            result = function(value, *args, **values)
        if isinstance(result, Iterator):
            result = list(self.counted(result))
        if isinstance(result, (list, tuple, Mapping)):
            self.made(result)
        elif slow and isinstance(result, str):
            self.budget.make(len(result))
        self.budget.extent(result)
        if type(result) is str and all(self.budget.extent(one).own for one in (value, *args, *values.values())):
            return own(result)
        return result

    def _tested(self, function: Any) -> Any:
        def test(*args: Any) -> bool:
            for value in args:
                self.budget.touch(value)
            return bool(function(*args))

        return test

    def _text_filter(self, method: str, value: Any, *args: Any, **values: Any) -> Any:
        return self._text_method(method, self.string(value), *args, **values)

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> Any:
        return self._text_filter("replace", value, self.string(old), self.string(new), -1 if count is None else count)

    def _text_method(self, name: str, text: str, *args: Any, **values: Any) -> Any:
        for value in (text, *args, *values.values()):
            self.budget.touch(value)
        if name == "join":
            return self._join(args[0], text)
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

    def _join(self, values: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
        get = jinja2.filters.make_attrgetter(self, attribute) if attribute is not None else lambda value: value
        pieces = [self.string(get(value)) for value in self.counted(values)]
        self.budget.make(len(separator) * len(pieces))
        return self.concat([part for piece in pieces for part in (separator, piece)][1:])

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self.string(value)
        _require_width(len(width) if isinstance(width, str) else width)
        self.budget.make(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
        made = jinja2.filters.do_indent(str.__str__(text), width, first, blank)
        return own(made) if is_own(text) and (not isinstance(width, str) or is_own(width)) else made

    def _tojson(
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

    def _percent(self, form: str, values: Any) -> str:
        if re.search(r"[*]|\d{4}", form):
            raise SecurityError(f"a format may pad to {MAX_WIDTH - 1} characters at most")
        extent = self.budget.extent(values)
        self.budget.make(len(form) + form.count("%") * (MAX_WIDTH + 12 * extent.size))
        made = str.__mod__(form, values)
        return own(made) if is_own(form) and extent.own else made

    def _namespace(self, *pairs: Any, **values: Any) -> Namespace:
        filled = Namespace()
        for name, value in dict(*pairs, **values).items():
            filled[name] = value
        return filled

    def _raise_exception(self, message: Any) -> None:
        raise jinja2.TemplateError(self.string(message))


@jinja2.pass_context
def _printed(context: jinja2.runtime.Context, value: Any) -> str:
    return context.environment.string(value)  # type: ignore[attr-defined]


def _strftime_now(form: str) -> str:
    if len(form) > MAX_WIDTH or re.search(r"%(?!-?[A-Za-z%])", form):
        raise SecurityError("a date's format has letters after its % signs, and no widths")
    return datetime.datetime.now().strftime(form)


def _require_width(width: int) -> None:
    if width > MAX_WIDTH:
        raise SecurityError(f"a width may be {MAX_WIDTH} at most, not {width}")
