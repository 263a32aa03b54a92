"""What sequences keep between steps, as arrays that a decoder graph reads and writes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from moevlm.runtime.backends.ort.binding import Binding
from moevlm.runtime.core.states import PagedKV, Recurrent, StateSpec, output_name
from moevlm.runtime.engine.step import Step

_SMALLEST = 64  # tokens that a sequence has room for at first, where it lies in one page
NewBinding = Callable[[], Binding]


class Pool(Protocol):
    """The memory of all pages and state rows."""

    def bound(self, step: Step) -> Binding:
        """A binding that reads and writes what the step's sequences keep."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy a page in all layers."""
        ...

    def clear(self, row: int) -> None:
        """Set a row of every recurrent state to zero."""
        ...

    def copy_row(self, source: int, target: int) -> None:
        """Copy a row of every recurrent state."""
        ...


class _Rows:
    """Rows of recurrent states."""

    def __init__(self, states: tuple[StateSpec, ...], rows: int) -> None:
        self._rows = _state_rows(states, rows)

    def clear(self, row: int) -> None:
        for array in self._rows.values():
            array[row] = 0

    def copy_row(self, source: int, target: int) -> None:
        for array in self._rows.values():
            array[target] = array[source]


class SharedPages(_Rows):
    """Pages of a fixed size: any sequence of a step has any of them. Memory is taken when it is first written."""

    def __init__(self, new: NewBinding, states: tuple[StateSpec, ...], pages: int, rows: int, page_size: int) -> None:
        self._binding = new()
        super().__init__(states, rows)
        self._pages = _caches(states, pages, page_size)
        _bind(self._binding, self._rows | self._pages)

    def bound(self, step: Step) -> Binding:  # noqa: ARG002 - every step's pages are here
        return self._binding

    def copy(self, source: int, target: int) -> None:
        for array in self._pages.values():
            array[target] = array[source]


class SequencePages(_Rows):
    """A page for each sequence, which grows with it: a graph that takes one sequence a step reads no page table."""

    def __init__(self, new: NewBinding, states: tuple[StateSpec, ...], rows: int, context: int) -> None:
        self._new, self._states, self._context = new, states, context
        super().__init__(states, rows)
        self._pages: dict[int, _Page] = {}

    def bound(self, step: Step) -> Binding:
        number, kept = (int(values.flat[0]) for values in (step.page_table, step.context_len))
        needed = kept + step.tokens
        capacity = min(self._context, max(_SMALLEST, 1 << (needed - 1).bit_length()))
        page = self._pages.get(number)
        if page is None or page.capacity < needed or (kept == 0 and page.capacity != capacity):
            grown = self._page(capacity)
            if page is not None and kept:
                grown.take(page, kept)
            self._pages[number] = page = grown
        return page.binding

    def _page(self, capacity: int) -> _Page:
        page = _Page(self._new(), _caches(self._states, 1, capacity), capacity)
        _bind(page.binding, self._rows | page.caches)
        return page

    def copy(self, source: int, target: int) -> None:
        given = self._pages[source]
        self._pages[target] = copied = self._page(given.capacity)
        copied.take(given, given.capacity)


class _Page:
    """caches: [1, kv_heads, capacity, D] by the names of the graph's inputs."""

    def __init__(self, binding: Binding, caches: dict[str, np.ndarray], capacity: int) -> None:
        self.binding, self.caches, self.capacity = binding, caches, capacity

    def take(self, other: _Page, tokens: int) -> None:
        """Copy the first tokens of another page."""
        for name, array in self.caches.items():
            array[:, :, :tokens] = other.caches[name][:, :, :tokens]


def _caches(states: tuple[StateSpec, ...], pages: int, page_size: int) -> dict[str, np.ndarray]:
    return {
        name: np.zeros((pages, state.kv_heads, page_size, width), state.dtype)
        for state in states
        if isinstance(state, PagedKV)
        for name, width in state.widths.items()
    }


def _state_rows(states: tuple[StateSpec, ...], rows: int) -> dict[str, np.ndarray]:
    return {
        state.tensor: np.zeros((rows, *state.shape), state.dtype) for state in states if isinstance(state, Recurrent)
    }


def _bind(binding: Binding, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        binding.replace(name, output_name(name), array)
