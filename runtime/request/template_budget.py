"""Limits of the work of a chat template, counted as it happens: the same on every machine, in every thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.request.template_text import is_own

MAX_STEPS = 1_000_000  # about a second
MAX_DEPTH = 64
MAX_BITS = 4096
CHARACTERS_OF_A_STEP = 256  # that are compared or searched in about the time of a step
CHARACTERS_OF_AN_ELEMENT = 8  # a list needs as much memory for one


class Extent(NamedTuple):
    """The extent of a value with all that is in it; an element counts as often as it is reached.

    size: in characters. depth: of lists and objects in each other. own: all text in it is the template's own.
    """

    size: int
    depth: int
    own: bool


class Budget:
    """Counts steps (operations and turns of loops) and the characters of all that is made; refuses what is too much.

    Values of a template never change, so what a list holds is measured once, when it is made, and then remembered:
    a list that holds another twice, forty times over, is small in memory and endless to print or compare.
    """

    def __init__(self, given: int) -> None:
        """given: characters of the messages."""
        self._steps = MAX_STEPS
        self._made = self._most = (1 << 20) + 32 * given
        self._known: dict[int, tuple[Any, Extent]] = {}  # by id, which holds while the value is kept here

    def step(self, count: int = 1) -> None:
        self._steps -= max(0, count)
        if self._steps < 0:
            raise RequestError(f"the chat template takes more than {MAX_STEPS} steps for these messages")

    def touch(self, value: Any) -> None:
        """A step, and those that it takes to look at all of a value."""
        self.step(1 + self.extent(value).size // CHARACTERS_OF_A_STEP)

    def make(self, characters: int) -> None:
        """To be called before something of so many characters is made."""
        self._made -= max(0, characters)
        if self._made < 0:
            raise RequestError(f"the chat template makes more than {self._most} characters of these messages")

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the items of a loop, a step for each."""
        for item in items:
            self.step()
            yield item

    def bits(self, count: int) -> None:
        """To be called before a number of so many bits is made."""
        if count > MAX_BITS:
            raise RequestError(f"the chat template makes a number of more than {MAX_BITS} bits")

    def extent(self, value: Any) -> Extent:
        if isinstance(value, str):
            return Extent(len(value), 0, is_own(value))
        if isinstance(value, int):
            self.bits(value.bit_length())
            return Extent(value.bit_length() // 3, 0, True)
        if isinstance(value, range):
            return Extent(CHARACTERS_OF_AN_ELEMENT * len(value), 1, True)
        if not isinstance(value, (list, tuple, Mapping)):
            return Extent(1, 0, True)
        known = self._known.get(id(value))
        if known is None:
            items = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            parts = [self.extent(item) for item in items]
            extent = Extent(
                sum(part.size + CHARACTERS_OF_AN_ELEMENT for part in parts) + CHARACTERS_OF_AN_ELEMENT,
                1 + max((part.depth for part in parts), default=0),
                all(part.own for part in parts),
            )
            if extent.depth > MAX_DEPTH or extent.size > self._most:
                raise RequestError("the chat template makes lists that are too deep or too large")
            self.step(1 + len(parts) // 8)
            known = self._known[id(value)] = value, extent
        return known[1]
