"""Where canonical weights come from: a checkpoint tensor as it is, or several of them rearranged, always lazily."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.export.graph.rearranged import Flat, Parts, Reordered, RowBlocks, swap_last
from moevlm.export.graph.weights import Concat, Constant, PerRow, Stack, Weight, cast
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import CheckpointError

# What can be widened to float32 as it is; integers and fp8 mean something only together with their scales.
_FLOATS = tuple(DTYPES[name].numpy for name in ("bfloat16", "float16", "float32", "float64"))

Shape = tuple[int, ...]
Tensors = Mapping[str, Weight]
Indices = Mapping[str, str]
Source = Callable[[Tensors, Indices, Shape, str], Weight]


def stored(tensors: Tensors, name: str) -> Weight:
    """The tensor of this name. Raises CheckpointError for a dtype that means nothing by itself."""
    weight = tensors[name]
    if weight.dtype not in _FLOATS:
        supported = ", ".join(map(str, _FLOATS))
        raise CheckpointError(f"tensor {name} has dtype {weight.dtype} (supported: {supported})")
    return weight


def expect(name: str, weight: Weight, shape: Shape) -> Weight:
    """The same weight. Raises CheckpointError for another shape."""
    if weight.shape != shape:
        raise CheckpointError(f"tensor {name} has shape {list(weight.shape)}, the config asks for {list(shape)}")
    return weight


def changed(
    pattern: str, change: Callable[[Weight, Shape], Weight], on_disk: Callable[[Shape], Shape] = lambda shape: shape
) -> Source:
    """What `change` makes of the tensor of this name, {i} filled in, and of the shape that is asked for.

    on_disk: the tensor's shape, by that one.
    """

    def source(tensors: Tensors, indices: Indices, shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        return change(expect(name, stored(tensors, name), on_disk(shape)), shape)

    return source


def named(pattern: str) -> Source:
    """The tensor of this name, {i} filled in."""
    return changed(pattern, lambda weight, _: weight)


@dataclass(frozen=True)
class FirstOf:
    """The tensor under the first of these names that there is, {i} filled in."""

    patterns: tuple[str, ...]

    def __call__(self, tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
        there = (pattern for pattern in self.patterns if pattern.format(**indices) in tensors)
        return named(next(there, self.patterns[0]))(tensors, indices, shape, layout)


def first_name(source: str | Source) -> str:
    """The name that is asked for first; empty for a source that says none."""
    if isinstance(source, str):
        return source
    return source.patterns[0] if isinstance(source, FirstOf) else ""


def ones(_tensors: Tensors, _indices: Indices, shape: Shape, _layout: str) -> Weight:
    """The gain of a norm that has none."""
    return Constant(np.ones(shape, np.float32))


def reordered(pattern: str, order: Sequence[int]) -> Source:
    """Rows of a matrix, or numbers of a bias, each group of len(order) of them in this order."""
    return changed(pattern, lambda weight, _: Reordered(weight, order))


def side_by_side(*sources: Source) -> Source:
    """Projections of one size as one: the rows of the first, then those of the next."""

    def source(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
        part = (shape[0] // len(sources), *shape[1:])
        return Concat([one(tensors, indices, part, layout) for one in sources])

    return source


def rows_of_heads(pattern: str, size: int, start: int, *, turned: bool = False) -> Source:
    """Some of each head's rows of a projection, as a matrix for each head: [heads, rows, K].

    size: all rows of a head. start: the first of them. turned: as [heads, K, rows].
    """

    def source(tensors: Tensors, indices: Indices, shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        heads, rows, width = (shape[0], shape[2], shape[1]) if turned else shape
        weight = expect(name, stored(tensors, name), (heads * size, width))
        own = Parts(RowBlocks(weight, rows, size, start), rows)
        return swap_last(own) if turned else own

    return source


def halves(dim: int, start: int = 0, size: int = 0) -> tuple[int, ...]:
    """The order of a head's rows in which dimensions that turn in pairs of neighbours turn as two halves.

    dim: how many turn. start: the first of them. size: of the head, 0 where all of it turns.
    """
    turning = (*range(start, start + dim, 2), *range(start + 1, start + dim, 2))
    return (*range(start), *turning, *range(start + dim, size or dim))


def turned(pattern: str) -> Source:
    """A matrix that is stored with its axes exchanged."""
    return changed(pattern, lambda weight, _: Flat(swap_last(Stack([weight]))), lambda shape: shape[::-1])


def row_of(pattern: str, row: int, rows: int) -> Source:
    """One row of a matrix of so many."""
    return changed(pattern, lambda weight, _: Flat(RowBlocks(weight, 1, rows, row)), lambda shape: (rows, *shape))


def without_batch(pattern: str) -> Source:
    """[1, n, ...] -> [n, ...]."""
    return changed(pattern, lambda weight, _: Flat(weight), lambda shape: (1, *shape))


def as_row(pattern: str) -> Source:
    """[n] -> [1, n]."""
    return changed(pattern, lambda weight, _: Stack([weight]), lambda shape: shape[1:])


def both_halves(pattern: str) -> Source:
    """A projection of two equal rows, one behind the other, on one of them: [N, 2K] -> [N, K], the sum of both."""
    return changed(pattern, _sum_of_halves, lambda shape: (shape[0], 2 * shape[1]))


def _sum_of_halves(weight: Weight, shape: Shape) -> Weight:
    return _in_float32(weight, shape, lambda a: a[:, : shape[1]] + a[:, shape[1] :])


def _in_float32(weight: Weight, shape: Shape, change: Callable[[np.ndarray], np.ndarray]) -> Weight:
    """Rows changed in float32, whatever their dtype."""
    weight = cast(weight, np.dtype(np.float32))
    return PerRow(weight, shape, weight.dtype, change)


def plus_one(pattern: str) -> Source:
    """The gain of a norm stored as its difference from 1 (Gemma): w -> 1 + w in float32, whatever the dtype of w."""
    return changed(pattern, lambda weight, shape: _in_float32(weight, shape, lambda a: a + np.float32(1)))


def exponential(pattern: str) -> Source:
    """What is stored as its logarithm: w -> exp(w) in float32, whatever the dtype of w."""
    return changed(pattern, lambda weight, shape: _in_float32(weight, shape, np.exp))


def halves_of_heads(pattern: str, heads: str, part: int) -> Source:
    """One of two projections that are stored as one: a head's rows of the first, then its rows of the second.

    heads: the gain of a head's norm. part: 0 for the first projection, 1 for the second.
    """

    def source(tensors: Tensors, indices: Indices, shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        weight = expect(name, stored(tensors, name), (2 * shape[0], *shape[1:]))
        size = head_size(tensors, heads.format(**indices), shape[0])
        return RowBlocks(weight, size, 2 * size, part * size)

    return source


def blocks_of_rows(pattern: str, sizes: Sequence[int], parts: Sequence[int]) -> Source:
    """Some of several projections that are stored as one: a group's rows of each, then those of the next group.

    sizes: rows of a group, by projection. parts: numbers of the projections, which follow each other here.
    """
    taken, every = sum(sizes[part] for part in parts), sum(sizes)

    def blocks(weight: Weight, _: Shape) -> Weight:
        return Concat([RowBlocks(weight, sizes[part], every, sum(sizes[:part])) for part in parts])

    return changed(pattern, blocks, lambda shape: (shape[0] // taken * every, *shape[1:]))


def head_size(tensors: Tensors, name: str, rows: int, unit: int = 1) -> int:
    """How many rows a head has, by the gain of its norm, which has this name. rows: of all heads.

    Raises CheckpointError for a gain that is no vector, or of a size that is no multiple of `unit` or does not divide
    the rows.
    """
    shape = stored(tensors, name).shape
    if len(shape) != 1 or not shape[0] or shape[0] % unit or rows % shape[0]:
        raise CheckpointError(f"tensor {name} has shape {list(shape)}, the config asks for heads of {rows} rows")
    return shape[0]


def rooted(pattern: str, power: int) -> Source:
    """A vector times the root of its width to a power, float32."""

    def change(weight: Weight, shape: Shape) -> Weight:
        factor = np.float32(shape[0] ** (power / 2))
        return _in_float32(weight, shape, lambda a: a * factor)

    return changed(pattern, change)
