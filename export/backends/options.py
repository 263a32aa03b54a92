"""Options of `moevlm build`: each backend states its own once, as fields of a dataclass, for the API and the CLI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from moevlm.export.formats.registry import GROUP_SIZES
from moevlm.export.formats.sparsity import SPARSITIES
from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import RefusedBuildOption

Values = Mapping[str, Any]
T = TypeVar("T")
_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What the command line says of an option. whose: the targets that it is for.

    counts: whether it says something about a target of its backend, given its name and all options.
    choices: the values that are allowed; empty for a number or a flag.
    """

    help: str
    whose: str
    counts: Callable[[str, Values], bool] = lambda _target, _values: True
    choices: tuple[Any, ...] = ()

    def with_(self, other: Option) -> Option:
        """Both as one option of the command line; each says for itself what it is for where they differ."""
        if (self.help, self.whose, self.choices) == (other.help, other.whose, other.choices):
            return self
        choices = tuple(dict.fromkeys((*self.choices, *other.choices)))
        helps, whose = dict.fromkeys((self.help, other.help)), dict.fromkeys((self.whose, other.whose))
        return replace(self, help=" ".join(helps), whose=", ".join(whose), choices=choices)


def option(default: T, told: Option) -> T:
    """A field of an options class, with its default."""
    made: T = field(default=default, metadata={_KEY: told})
    return made


def group_size(counts: Callable[[str, Values], bool], more: str = "", choices: tuple[int, ...] = GROUP_SIZES) -> int:
    """The field `group_size` of a backend whose targets may be quantized.

    more: what else is to be said of it, where 0 leaves it to the checkpoint.
    """
    whose = "targets with int8, int4, fp8 or fp4 weights, on rtx and trt those of --experts"
    usual = "Weights per scale in int8, int4, fp8 and fp4: 32, by default, or 128."
    told = Option(more or usual, whose, counts, choices)
    return option(0 if more else defaults.GROUP_SIZE, told)


def sparsity() -> str:
    """The field `sparsity`, which every backend has."""
    help_ = "Prune the dense layers: of every four weights the two smallest become zero."
    return option("", Option(help_, "all targets", choices=SPARSITIES))


def options_of(kind: type) -> dict[str, tuple[Any, Option]]:
    """The default and the description of each option of an options class, by name."""
    return {one.name: (one.default, one.metadata[_KEY]) for one in _options(kind)}


def made(kind: type[T], given: Values) -> T:
    """The options of one backend, from all that were given. Raises RefusedBuildOption."""
    return kind(**{one.name: given[one.name] for one in _options(kind) if one.name in given})


def check_choices(options: Any) -> None:
    """Raises RefusedBuildOption for a choice that there is not."""
    for one in _options(type(options)):
        value, choices = getattr(options, one.name), one.metadata[_KEY].choices
        if choices and value not in (*choices, one.default):
            raise RefusedBuildOption(one.name, value, ", ".join(map(str, choices)))


def _options(kind: Any) -> list[Field[Any]]:
    return [one for one in fields(kind) if _KEY in one.metadata]
