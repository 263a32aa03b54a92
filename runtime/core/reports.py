"""The base of what commands write as JSON; each report's struct lies beside the code that fills it in.

The field `schema` names the shape and its version; docs/json.md describes every field.
"""

from typing import Any

import msgspec

from moevlm.runtime.core.printable import UNFIT


class Report(msgspec.Struct, frozen=True, tag_field="schema"):
    """Base of all reports; a report's tag is its field `schema`."""


def to_json(report: Report) -> str:
    """The report as indented JSON text, characters that a terminal would obey as \\u009b.

    A path that is not UTF-8 is in it with \\udcff for each byte that is not.
    """
    try:
        data = msgspec.json.encode(report)
    except UnicodeEncodeError:
        data = msgspec.json.encode(_encodable(msgspec.to_builtins(report)))
    text = msgspec.json.format(data, indent=2).decode()
    return UNFIT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list | tuple) else value
