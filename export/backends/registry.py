"""The backends that there are: a line each. What is heavy in them is imported when a target of theirs is built."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moevlm.export.backends.options import Option, made, options_of
from moevlm.runtime.core.errors import BuildError

if TYPE_CHECKING:
    from moevlm.export.backends.base import Target

_HERE = "moevlm.export.backends"


@dataclass(frozen=True)
class Line:
    """A backend. kinds: what its targets' names begin with, up to a colon. folder: its folder, which has

    options.py: `Options`, a dataclass of `option` fields; NAMES of its targets, for people; PLANNED, names that a dry
    run looks at where it is told none; nothing heavy.
    target.py: targets(name, options) -> the targets of one name, empty if there is none of that name.
    """

    kinds: tuple[str, ...]
    folder: str

    @cached_property
    def options(self) -> type:
        """Its options class."""
        kind: type = self._module("options").Options
        return kind

    @property
    def names(self) -> tuple[str, ...]:
        """Its targets, as --target takes them."""
        found: tuple[str, ...] = self._module("options").NAMES
        return found

    @property
    def planned(self) -> tuple[str, ...]:
        """Targets that a dry run looks at where it is told none."""
        found: tuple[str, ...] = self._module("options").PLANNED
        return found

    def targets(self, name: str, given: Mapping[str, Any]) -> tuple[Target, ...]:
        """The targets of one name. Raises BuildError for a value."""
        found: tuple[Target, ...] = self._module("target").targets(name, made(self.options, given))
        return found

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"{_HERE}.{self.folder}.{name}")


BACKENDS = (
    Line(("reference", "ort-cpu"), "ort"),
    Line(("cpu",), "cpu"),
    Line(("rtx", "trt"), "tensorrt"),
)


def target_names() -> tuple[str, ...]:
    """All that --target takes."""
    return tuple(name for line in BACKENDS for name in line.names)


def planned_names() -> tuple[str, ...]:
    """Targets that a dry run looks at where it is told none."""
    return tuple(name for line in BACKENDS for name in line.planned)


def all_options() -> dict[str, tuple[Any, Option]]:
    """The default and the description of every option of any backend, by name.

    One that several have and state differently is told together, and without a default where theirs are not one.
    """
    found: dict[str, tuple[Any, Option]] = {}
    for line in BACKENDS:
        for name, (default, told) in options_of(line.options).items():
            first, known = found.get(name, (default, told))
            found[name] = (first if first == default else type(first)(), known.with_(told))
    return found


def targets(names: Iterable[str], given: Mapping[str, Any]) -> tuple[Target, ...]:
    """As `known_targets`; also raises BuildError for a target that cannot be built on this machine."""
    found = known_targets(names, given)
    for target in found:
        target.require_machine()
    return found


def known_targets(names: Iterable[str], given: Mapping[str, Any]) -> tuple[Target, ...]:
    """The targets of these names, each once; ort-cpu:fp32 is ort-cpu, and trt:sm80,sm90 are two.

    given: options by name, those that were asked for. Raises BuildError for a name or a value that there is not, or an
    option that counts for none of the targets.
    """
    names = tuple(names)
    lines = {name: _line_of(name) for name in names}
    require_effect(names, given)
    chosen: dict[str, Target] = {}
    for name, line in lines.items():
        found = line.targets(name, given)
        if not found:
            raise _unknown(name)
        chosen |= {target.name: target for target in found}
    return tuple(chosen.values())


def _line_of(name: str) -> Line:
    kind = name.partition(":")[0]
    for line in BACKENDS:
        if kind in line.kinds:
            return line
    raise _unknown(name)


def _unknown(name: str) -> BuildError:
    return BuildError(f'unknown target "{name}" (allowed: {", ".join(target_names())})')


def counting(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of options by name, those that count for the target of this name. Raises BuildError for a name that there is not.

    given: as in `known_targets`.
    """
    line, values = _line_of(name), {n: default for n, (default, _) in all_options().items()} | dict(given)
    return {n: value for n, value in given.items() if _counts(n, name, line, values)}


def require_effect(names: Iterable[str], given: Mapping[str, Any]) -> None:
    """Raise BuildError for an option that there is not, or that counts for none of the targets."""
    names, known = tuple(names), all_options()
    for option in given:
        if option not in known:
            raise BuildError(f"there is no option {option} (allowed: {', '.join(known)})")
        if names and not any(option in counting(name, given) for name in names):
            flag, whose = f"--{option.replace('_', '-')}", known[option][1].whose
            raise BuildError(f"{flag} has no effect on {', '.join(names)} (it is for {whose})")


def _counts(option: str, target: str, line: Line, values: Mapping[str, Any]) -> bool:
    found = options_of(line.options).get(option)
    return found is not None and found[1].counts(target, values)
