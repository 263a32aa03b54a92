"""A JSON object from text that somebody else wrote: one error for all that can be wrong with it."""

import json
from typing import Any

from moevlm.runtime.core.errors import MoevlmError

MAX_DEPTH = 64  # objects and lists inside one another; tokenizer.json and config.json have some ten
MAX_DIGITS = 300  # of an integer: one that float can hold, for it will meet floats


def json_object(text: str | bytes, name: str, error: type[MoevlmError]) -> dict[str, Any]:
    """Parse a JSON object, given as text or as bytes of UTF-8. name: what to call it in messages.

    Raises `error`, in one line, for text that is not UTF-8 or not JSON, a value of another type, and a depth, a
    number or a text that no file of this kind has: a recursion, a conversion to float or to UTF-8 would fail later.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode(), parse_int=_integer, parse_float=_number)
    except UnicodeDecodeError as problem:
        raise error(f"{name} is not UTF-8 text: {problem.reason} at byte {problem.start}") from None
    except RecursionError:
        raise error(_too_deep(name)) from None
    except ValueError as problem:
        raise error(f"{name} is not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{name} is not a JSON object")
    if _deeper_than(MAX_DEPTH, value):
        raise error(_too_deep(name))
    if ("\\u" if isinstance(text, str) else b"\\u") in text and not _is_unicode(value):  # type: ignore[operator]
        raise error(f"{name} has a text that is not Unicode: half of a surrogate pair")
    return value


def _too_deep(name: str) -> str:
    return f"{name} has objects or lists nested more than {MAX_DEPTH} deep"


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits (allowed: up to {MAX_DIGITS})")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _deeper_than(limit: int, value: Any) -> bool:
    """Level by level, without recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True
