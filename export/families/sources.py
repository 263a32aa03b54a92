"""Where canonical weights come from: a checkpoint tensor as it is, or several of them rearranged, always lazily."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.export.graph.rearranged import Flat, Parts, Reordered, RowBlocks, reshape, swap_last
from moevlm.export.graph.weights import Constant, PerRow, Stack, Weight, cast
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import CheckpointError

# What can be widened to float32 as it is; integers and fp8 mean something only together with their scales.
_FLOATS = tuple(DTYPES[name].numpy for name in ("bfloat16", "float16", "float32", "float64"))

Shape = tuple[int, ...]
Source = Callable[[Mapping[str, Weight], Mapping[str, str], Shape, str], Weight]


def stored(tensors: Mapping[str, Weight], name: str) -> Weight:
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


def _expect_rank(name: str, weight: Weight, *ranks: int) -> Weight:
    if len(weight.shape) not in ranks:
        asked = " or ".join(map(str, ranks))
        raise CheckpointError(f"tensor {name} has shape {list(weight.shape)}, the model asks for {asked} dimensions")
    return weight


def named(pattern: str) -> Source:
    """The tensor of this name, {i} filled in."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        return expect(name, stored(tensors, name), shape)

    return source


@dataclass(frozen=True)
class FirstOf:
    """The tensor under the first of these names that there is, {i} filled in."""

    patterns: tuple[str, ...]

    def __call__(self, tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, layout: str) -> Weight:
        there = (pattern for pattern in self.patterns if pattern.format(**indices) in tensors)
        return named(next(there, self.patterns[0]))(tensors, indices, shape, layout)


def first_name(source: str | Source) -> str:
    """The name that is asked for first; empty for a source that says none."""
    if isinstance(source, str):
        return source
    return source.patterns[0] if isinstance(source, FirstOf) else ""


def ones(_tensors: Mapping[str, Weight], _indices: Mapping[str, str], shape: Shape, _layout: str) -> Weight:
    """The gain of a norm that has none."""
    return Constant(np.ones(shape, np.float32))


def reordered(pattern: str, order: Sequence[int]) -> Source:
    """Rows of a matrix, or numbers of a bias, each group of len(order) of them in this order."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, layout: str) -> Weight:
        return Reordered(named(pattern)(tensors, indices, shape, layout), order)

    return source


def rows_of_heads(pattern: str, size: int, start: int, *, turned: bool = False) -> Source:
    """Some of each head's rows of a projection, as a matrix for each head: [heads, rows, K].

    size: all rows of a head. start: the first of them. turned: as [heads, K, rows].
    """

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
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

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        return Flat(swap_last(Stack([expect(name, stored(tensors, name), shape[::-1])])))

    return source


def row_of(pattern: str, row: int, rows: int) -> Source:
    """One row of a matrix of so many."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        return Flat(RowBlocks(expect(name, stored(tensors, name), (rows, *shape)), 1, rows, row))

    return source


def both_halves(pattern: str) -> Source:
    """A projection of two equal rows, one behind the other, on one of them: [N, 2K] -> [N, K], the sum of both."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
        name, (rows, width) = pattern.format(**indices), shape
        weight = cast(expect(name, stored(tensors, name), (rows, 2 * width)), np.dtype(np.float32))
        return PerRow(weight, shape, weight.dtype, lambda a: a[:, :width] + a[:, width:])

    return source


def plus_one(pattern: str) -> Source:
    """The gain of a norm stored as its difference from 1 (Gemma): w -> 1 + w in float32, whatever the dtype of w."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, layout: str) -> Weight:
        weight = cast(named(pattern)(tensors, indices, shape, layout), np.dtype(np.float32))
        return PerRow(weight, shape, weight.dtype, lambda a: a + np.float32(1))

    return source


def exponential(pattern: str) -> Source:
    """What is stored as its logarithm: w -> exp(w) in float32, whatever the dtype of w."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, layout: str) -> Weight:
        weight = cast(named(pattern)(tensors, indices, shape, layout), np.dtype(np.float32))
        return PerRow(weight, shape, weight.dtype, np.exp)

    return source


def depthwise(pattern: str) -> Source:
    """A convolution over tokens that takes each channel for itself: [C, 1, kernel] -> [C, kernel]."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        return reshape(expect(name, stored(tensors, name), (shape[0], 1, *shape[1:])), shape)

    return source


def halves_of_heads(pattern: str, heads: str, part: int) -> Source:
    """One of two projections that are stored as one: a head's rows of the first, then its rows of the second.

    heads: a tensor whose first dimension is the size of a head. part: 0 for the first projection, 1 for the second.
    """

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        size = stored(tensors, heads.format(**indices)).shape[0]
        weight = expect(name, stored(tensors, name), (2 * shape[0], *shape[1:]))
        return RowBlocks(weight, size, 2 * size, part * size)

    return source


def rooted(pattern: str, power: int) -> Source:
    """A vector times the root of its width to a power, float32."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, layout: str) -> Weight:
        weight = cast(named(pattern)(tensors, indices, shape, layout), np.dtype(np.float32))
        factor = np.float32(shape[0] ** (power / 2))
        return PerRow(weight, shape, weight.dtype, lambda a: a * factor)

    return source


def flattened(pattern: str) -> Source:
    """A convolution over non-overlapping patches as a matrix: [out, in, (t,) h, w] -> [out, in * (t *) h * w]."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        weight = _expect_rank(name, stored(tensors, name), 4, 5)
        return expect(name, reshape(weight, (weight.shape[0], int(np.prod(weight.shape[1:])))), shape)

    return source


def channels_last(pattern: str) -> Source:
    """A strided 2-D convolution on rows [kh, kw, in]: [out, in, kh, kw] -> [out, kh * kw * in]."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        weight = _expect_rank(name, stored(tensors, name), 4)
        out, channels, height, width = weight.shape
        rows = PerRow(
            weight,
            (out, channels * height * width),
            weight.dtype,
            lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).reshape(len(a), -1),
        )
        return expect(name, rows, shape)

    return source


def unfolded(pattern: str) -> Source:
    """A projection of blocks of patches to the width of one, on rows of patches: [C, C * k] -> [C, k * C]."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, layout: str) -> Weight:
        weight = named(pattern)(tensors, indices, shape, layout)
        split = (shape[0], shape[1] // shape[0])
        return PerRow(
            weight,
            shape,
            weight.dtype,
            lambda a: np.ascontiguousarray(a.reshape(-1, *split).swapaxes(1, 2)).reshape(len(a), -1),
        )

    return source
