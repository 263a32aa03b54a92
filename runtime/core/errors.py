"""Every error that a user can cause, as one small tree. The CLI prints the message as one line and exits with 2."""

import operator
import reprlib
from typing import SupportsIndex


class MoevlmError(Exception):
    """Base of all errors raised on purpose: the message names the field or file, its value, and what is allowed."""


class CheckpointError(MoevlmError):
    """The checkpoint directory is incomplete, damaged, or not what its config says."""


class UnsupportedModelError(MoevlmError):
    """The checkpoint asks for an architecture or a field value that the exporter cannot reproduce."""


class ExportError(MoevlmError):
    """Tracing or writing the canonical graphs failed."""


class PassError(MoevlmError):
    """A graph rewrite found or left what it must not: a mistake of this program, found by its own checks."""


class BuildError(MoevlmError):
    """A target could not be built from the canonical graphs."""


class BundleError(MoevlmError):
    """A bundle is missing, damaged, or lacks what was asked for."""


class EngineError(MoevlmError):
    """An inference engine refused its artifact or its inputs."""


class Misfit(EngineError):
    """An engine does not run on this machine. need: what it needs, as in "needs sm89"."""

    def __init__(self, need: str) -> None:
        self.need = need
        super().__init__(f"the engine {need}")


class RequestError(MoevlmError):
    """A prompt, image or option of one generation request is not acceptable."""


class Cancelled(MoevlmError):
    """The caller cancelled the request while it ran."""


class QueueFull(MoevlmError):
    """As many requests as are allowed wait already."""


class DeadlineExceeded(MoevlmError):
    """A request did not end before its deadline."""


class RefusedValue(MoevlmError):
    """An option, or a field of a request, has a value that is not allowed; the command line calls it by its option.

    name: in the code. value: as it is. allowed: what would do, in words.
    """

    def __init__(self, name: str, value: object, allowed: str) -> None:
        self.name, self.value, self.allowed = name, value, allowed
        super().__init__(self.named(name))

    def named(self, name: str) -> str:
        """The message under another name."""
        return refusal(name, self.value, self.allowed)


class RefusedOption(RefusedValue, RequestError):
    """Of a request, or of how a bundle is loaded."""


class RefusedBuildOption(RefusedValue, BuildError):
    """Of a build."""


class FieldError(MoevlmError, ValueError):
    """A field of a configuration has a value that is not allowed; whoever knows the field's file names both.

    field: its name in the code. value: as it is. allowed: what would do, in words.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(self.named(field))

    def named(self, field: str) -> str:
        """The message under another name of the field."""
        return f"{field} = {quoted(self.value)} (allowed: {self.allowed})"


def one_line(text: object, most: int = 300) -> str:
    """str(text) for a message: on one line, without control characters, at most so many characters."""
    line = " ".join(str(text)[: 4 * most].split())
    line = "".join(char if char.isprintable() else "\ufffd" for char in line)
    return line if len(line) <= most else line[: most - 3] + "..."


def reason(error: BaseException) -> str:
    """The text of a library's exception, for a message: one line, or its type's name if it has none."""
    return one_line(error) or type(error).__name__


def shown(value: object) -> str:
    """A value for a message, shortened without ever being made as a whole.

    As JSON spells it where JSON can: most values come from such a file. Text alone is in single quotes, see `quoted`.
    """
    return one_line(_SHORT.repr(value), 60)


def refusal(name: str, value: object, allowed: str) -> str:
    """The message for a value that is not allowed."""
    return f"unsupported value {name} = {shown(value)} (allowed: {allowed})"


def quoted(value: object) -> str:
    """`shown`, but for text in JSON's quotation marks."""
    text = shown(value)
    if not isinstance(value, str):
        return text
    return f'"{text[1:]}' if text.endswith("...") else f'"{text[1:-1]}"'


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxother = 2, 20, 20, 60

    def repr_str(self, x: str, level: int) -> str:
        text = repr(x[:60])  # the beginning tells more than its two ends
        return text if level == self.maxlevel else f'"{text[1:-1]}"'

    def repr_bool(self, x: bool, level: int) -> str:  # noqa: ARG002 - reprlib's signature
        return "true" if x else "false"

    def repr_NoneType(self, x: None, level: int) -> str:  # noqa: ARG002 - reprlib's signature and names
        return "null"


_SHORT = _Short()


def require_positive(name: str, value: object) -> None:
    """Raises RequestError unless value is a whole number of at least 1."""
    if not (isinstance(value, SupportsIndex) and not isinstance(value, bool) and operator.index(value) >= 1):
        raise RefusedOption(name, value, "a whole number, 1 or more")
