"""Regular expressions that stand in a checkpoint's files: those that could take for ever are refused."""

import re
from typing import Any

from moevlm.runtime.core.errors import UnsupportedModelError, quoted

_LONGEST = 512
# The time that a match takes grows as the length of a name to the power of the repeats.
_MOST_REPEATS = 5
_REPEAT = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def compile_expression(place: str, pattern: Any, form: str = "{}") -> re.Pattern[str]:
    """The expression that stands at `place`. form: what it is put into, for `{}`.

    Raises UnsupportedModelError for what is no expression, or one that could take for ever.
    """
    fits = isinstance(pattern, str) and len(pattern) <= _LONGEST
    try:
        if fits and not _REPEATED_GROUP.search(pattern) and len(_REPEAT.findall(pattern)) <= _MOST_REPEATS:
            re.compile(pattern)  # alone, or a bracket in it could close one of the form
            return re.compile(form.replace("{}", pattern))
    except (re.error, RecursionError, OverflowError):
        pass
    raise UnsupportedModelError(
        f"unsupported value in {place}: {quoted(pattern)} (supported: regular expressions with at most "
        f"{_MOST_REPEATS} repeats, none of them of a group)"
    )
