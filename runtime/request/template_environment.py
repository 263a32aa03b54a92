"""Jinja's sandbox for chat templates: closed lists of what may be called, a budget, and text that keeps its marks."""

from __future__ import annotations

import datetime
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

from moevlm.runtime.request import template_text
from moevlm.runtime.request.template_budget import CHARACTERS_OF_AN_ELEMENT, Budget
from moevlm.runtime.request.template_code import Compiler
from moevlm.runtime.request.template_operations import MAX_WIDTH, TextOperations
from moevlm.runtime.request.template_text import MarkedText, is_own, own
from moevlm.runtime.request.template_values import Namespace, Undefined

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
_COLLECTIONS = ("count", "get", "index", "items", "keys", "values")


class Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; here it only contains them."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it on the instance)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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
        self.text = text = TextOperations(budget)
        # What the compiled template calls, beside the methods below.
        self.literal, self.string, self.tilde = text.literal, text.string, text.tilde
        self.counted = budget.counted
        known = jinja2.filters.FILTERS
        self.filters = {
            **{name: partial(self._filtered, known[name], False) for name in _QUICK},
            **{name: partial(self._filtered, known[name], True) for name in _SLOW},
            **{name: partial(text.filter, name) for name in _TEXT},
            "indent": text.indent,
            "join": self._join,
            "replace": text.replace,
            "safe": text.string,
            "string": text.string,
            "tojson": text.tojson,
            "trim": partial(text.filter, "strip"),
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

    def concat(self, pieces: Iterable[str]) -> str:
        return self.text.concat(pieces)

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
            return self.text.percent(left, right)
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
                return self.text.method(name, owner, *args, **values)
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

    def _join(self, values: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
        of_each = values if attribute is None else map(jinja2.filters.make_attrgetter(self, attribute), values)
        return self.text.join(of_each, separator)

    def _tested(self, function: Any) -> Any:
        def test(*args: Any) -> bool:
            for value in args:
                self.budget.touch(value)
            return bool(function(*args))

        return test

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
