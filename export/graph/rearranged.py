"""Recipes that put the numbers of a weight in another order: rows that are picked, axes that change places.

Each is a class that says what it does, so that codes of a quantized checkpoint can follow it, see `moved_codes`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.export.graph.weights import PerRow, Weight


@dataclass(frozen=True)
class Flat:
    """[a, b, ...] -> [a * b, ...]."""

    source: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        first, second, *others = self.source.shape
        return (first * second, *others)

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        inner = self.source.shape[1]
        first = start // inner
        whole = self.source.rows(first, -(-stop // inner)).reshape(-1, *self.shape[1:])
        return whole[start - first * inner : stop - first * inner]


@dataclass(frozen=True)
class Parts:
    """[a * size, ...] -> [a, size, ...]."""

    source: Weight
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *others = self.source.shape
        return (rows // self.size, self.size, *others)

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.source.rows(start * self.size, stop * self.size).reshape(-1, *self.shape[1:])


@dataclass(frozen=True)
class Reordered:
    """Each group of len(order) rows, its row i the row order[i] of that group before."""

    source: Weight
    order: Sequence[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        first, last = self.groups(start, stop)
        return self.turned(self.source.rows(first, last))[start - first : stop - first]

    def groups(self, start: int, stop: int) -> tuple[int, int]:
        """Where the whole groups begin and end that rows [start:stop] are of."""
        size = len(self.order)
        return start // size * size, -(-stop // size) * size

    def turned(self, array: np.ndarray) -> np.ndarray:
        """Whole groups of an array in the new order."""
        groups = array.reshape(-1, len(self.order), *array.shape[1:])
        return groups[:, list(self.order)].reshape(array.shape)


@dataclass(frozen=True)
class RowBlocks:
    """Blocks of `size` rows of a source, one in every `every` rows, the first of them at `first`."""

    source: Weight
    size: int
    every: int
    first: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[0] // self.every * self.size, *self.source.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        parts = [self.source.rows(a, b) for a, b in self.places(start, stop)]
        return np.concatenate(parts) if parts else self.source.rows(0, 0)

    def places(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where rows [start:stop] lie in the source, run by run."""
        for block in range(start // self.size, -(-stop // self.size)):
            shift = self.first + block * (self.every - self.size)
            yield max(start, block * self.size) + shift, min(stop, (block + 1) * self.size) + shift


@dataclass(frozen=True)
class Swapped:
    """[e, m, n] as [e, n, m]."""

    source: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        e, m, n = self.source.shape
        return e, n, m

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        return _swapped(self.source.rows(start, stop))


@dataclass(frozen=True)
class Picked:
    """Some places of the second axis: [e, m, ...] -> [e, len(places), ...], in the order of `places`."""

    source: Weight
    places: Sequence[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[0], len(self.places), *self.source.shape[2:])

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.pick(self.source.rows(start, stop))

    def pick(self, array: np.ndarray) -> np.ndarray:
        """The same places of the second axis of an array."""
        if isinstance(self.places, range) and self.places.step == 1:
            return array[:, self.places.start : self.places.stop]
        return array[:, np.asarray(self.places)]


@dataclass(frozen=True)
class Transposed:
    """[m, n] -> [n, m], for weights that are small: every slice reads all of the source."""

    source: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        m, n = self.source.shape
        return n, m

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(self.source.rows(0, self.source.shape[0])[:, start:stop].T)


def swap_last(source: Weight) -> Weight:
    """[e, m, n] -> [e, n, m], slice by slice."""
    return source.source if isinstance(source, Swapped) else Swapped(source)


def _swapped(array: np.ndarray) -> np.ndarray:
    """[..., m, n] -> [..., n, m] as a new array, 16 source rows at a time: twice to seven times numpy's own speed."""
    *outer, m, n = array.shape
    out = np.empty((*outer, n, m), array.dtype)
    for i in range(0, m, 16):
        out[..., i : i + 16] = array[..., i : i + 16, :].swapaxes(-1, -2)
    return out


def reshape(source: Weight, shape: tuple[int, ...]) -> Weight:
    """The same values in row-major order under another shape with the same first axis."""
    return PerRow(source, shape, source.dtype, lambda a: a.reshape(len(a), *shape[1:]))
