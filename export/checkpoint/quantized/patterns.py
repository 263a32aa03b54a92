"""Lists of modules in quantization configs: names, globs, and regular expressions behind `re:`."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from moevlm.export.checkpoint.expressions import compile_expression
from moevlm.runtime.core.errors import UnsupportedModelError, quoted

Matches = Callable[[str], bool]
_MOST = 1 << 12  # entries of a list: published ones have hundreds
_LONGEST = 512


def matches(place: str, patterns: Any, *, expressions: bool = False) -> Matches:
    """Whether a module's name is one of `patterns`, which stand at `place`.

    A name stands for the module, for all inside it, and for a module that ends with it; expressions: every pattern is a
    regular expression, which has to fit the beginning of a name. Raises UnsupportedModelError for anything but a list
    of texts, and for an expression that could take for ever.
    """
    if patterns is None:
        patterns = ()
    if not isinstance(patterns, list | tuple) or len(patterns) > _MOST:
        raise UnsupportedModelError(f"unsupported value in {place} = {quoted(patterns)} (supported: a list of names)")
    tests = [_test(place, pattern, expressions) for pattern in patterns]
    return lambda name: any(test(name) for test in tests)


def none(_name: str) -> bool:
    """`Matches` no module."""
    return False


def _test(place: str, pattern: Any, expression: bool) -> Matches:
    if not isinstance(pattern, str) or len(pattern) > _LONGEST:
        raise UnsupportedModelError(f"unsupported value in {place}: {quoted(pattern)} (supported: names)")
    if expression or pattern.startswith("re:"):
        compiled = compile_expression(place, pattern if expression else pattern.removeprefix("re:"))
        return lambda name: compiled.match(name) is not None
    if any(char in pattern for char in "*?["):
        return lambda name: fnmatchcase(name, pattern)
    return lambda name: name == pattern or name.startswith(f"{pattern}.") or name.endswith(f".{pattern}")
