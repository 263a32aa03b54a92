"""Constants of kernels as all versions of Triton take them that this package supports."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from triton import language as tl


class Attributes:
    """A dataclass whose attributes are constexprs: Triton 3.6 takes what it finds in one for a run-time value."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return tl.constexpr(as_constant(getattr(self._values, name)))

    def __repr__(self) -> str:
        return repr(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attributes) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)


def as_constant(value: Any) -> Any:
    """value, or its `Attributes` if it is a dataclass."""
    return Attributes(value) if is_dataclass(value) else value


def as_constants(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Each as Triton's compiler takes it. Its interpreter takes them as they are."""
    return {name: as_constant(value) for name, value in constants.items()}
