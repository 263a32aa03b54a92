"""Where canonical weights come from: a checkpoint tensor as it is, or several of them rearranged, always lazily."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.export.graph.rearranged import Parts, Reordered, RowBlocks, reshape, swap_last
from moevlm.export.graph.weights import Concat, Constant, PerRow, Stack, Weight, cast
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import CheckpointError

# The last two axes of fused expert tensors: out_in is [E, 2I, H] and [E, H, I], in_out is [E, H, 2I] and [E, I, H].
LAYOUTS = ("auto", "out_in", "in_out")

# What can be widened to float32 as it is; integers and fp8 mean something only together with their scales.
_FLOATS = tuple(DTYPES[name].numpy for name in ("bfloat16", "float16", "float32", "float64"))

Shape = tuple[int, ...]
Source = Callable[[Mapping[str, Weight], Mapping[str, str], Shape, str], Weight]


def _get(tensors: Mapping[str, Weight], name: str) -> Weight:
    weight = tensors[name]
    if weight.dtype not in _FLOATS:
        supported = ", ".join(map(str, _FLOATS))
        raise CheckpointError(f"tensor {name} has dtype {weight.dtype} (supported: {supported})")
    return weight


def _expect(name: str, weight: Weight, shape: Shape) -> Weight:
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
        return _expect(name, _get(tensors, name), shape)

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
        weight = _expect(name, _get(tensors, name), (heads * size, width))
        own = Parts(RowBlocks(weight, rows, size, start), rows)
        return swap_last(own) if turned else own

    return source


def halves(dim: int, start: int = 0, size: int = 0) -> tuple[int, ...]:
    """The order of a head's rows in which dimensions that turn in pairs of neighbours turn as two halves.

    dim: how many turn. start: the first of them. size: of the head, 0 where all of it turns.
    """
    turning = (*range(start, start + dim, 2), *range(start + 1, start + dim, 2))
    return (*range(start), *turning, *range(start + dim, size or dim))


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
        return reshape(_expect(name, _get(tensors, name), (shape[0], 1, *shape[1:])), shape)

    return source


def halves_of_heads(pattern: str, heads: str, part: int) -> Source:
    """One of two projections that are stored as one: a head's rows of the first, then its rows of the second.

    heads: a tensor whose first dimension is the size of a head. part: 0 for the first projection, 1 for the second.
    """

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        size = _get(tensors, heads.format(**indices)).shape[0]
        weight = _expect(name, _get(tensors, name), (2 * shape[0], *shape[1:]))
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
        weight = _expect_rank(name, _get(tensors, name), 4, 5)
        return _expect(name, reshape(weight, (weight.shape[0], int(np.prod(weight.shape[1:])))), shape)

    return source


def channels_last(pattern: str) -> Source:
    """A strided 2-D convolution on rows [kh, kw, in]: [out, in, kh, kw] -> [out, kh * kw * in]."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        weight = _expect_rank(name, _get(tensors, name), 4)
        out, channels, height, width = weight.shape
        rows = PerRow(
            weight,
            (out, channels * height * width),
            weight.dtype,
            lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).reshape(len(a), -1),
        )
        return _expect(name, rows, shape)

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


@dataclass(frozen=True)
class Experts:
    """All experts of a layer under `base`, however they lie: one tensor per expert and part, or fused in either layout.

    per_expert: the names to ask for where a layer has none of either.
    """

    base: str
    per_expert: bool

    def gate_up(self) -> "ExpertsPart":
        """Canonically [E, 2I, H], gate rows first."""
        return ExpertsPart(
            self.base,
            self._source("gate_up", ("gate", "up"), "down", lambda shape: (shape[0], shape[2], shape[1] // 2)),
        )

    def down(self) -> "ExpertsPart":
        """Canonically [E, H, I]."""
        return ExpertsPart(
            self.base, self._source("down", ("down",), "gate_up", lambda shape: (shape[0], 2 * shape[2], shape[1]))
        )

    def _source(self, part: str, parts: tuple[str, ...], other: str, other_shape: Callable[[Shape], Shape]) -> Source:
        fused = _fused(f"{self.base}.{part}_proj", f"{self.base}.{other}_proj", other_shape)
        stacked = _stacked(*(f"{self.base}.{{e}}.{name}_proj.weight" for name in parts))

        def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, layout: str) -> Weight:
            base = self.base.format(**indices)
            is_fused = any(f"{base}.{name}_proj" in tensors for name in ("gate_up", "down"))
            one = [f"{base}.0.{name}_proj.weight" for name in ("gate", "up", "down")]
            is_stacked = not is_fused and (self.per_expert or any(name in tensors for name in one))
            return (stacked if is_stacked else fused)(tensors, indices, shape, layout)

        return source


@dataclass(frozen=True)
class ExpertsPart:
    """One tensor of all experts of a layer, as the model wants it. base: the layer's experts, as in `Experts`.

    arranged: what happens to it behind an adapter's updates, which have the order of rows on disk.
    """

    base: str
    source: Source
    arranged: Callable[[Weight], Weight] = lambda weight: weight

    def __call__(self, tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, layout: str) -> Weight:
        return self.source(tensors, indices, shape, layout)


def _fused(pattern: str, sibling: str, sibling_shape: Callable[[Shape], Shape]) -> Source:
    """Either of the two layouts on disk, told apart by shape.

    A square tensor says nothing of itself. If its sibling in the layer has the canonical layout, so has it, and every
    reader agrees; if the sibling has the other one, Hugging Face turns the sibling and leaves the square tensor as it
    is, so its meaning is open and the option has to say.
    """

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, layout: str) -> Weight:
        name = pattern.format(**indices)
        weight, swapped = _get(tensors, name), (shape[0], shape[2], shape[1])
        if layout == "in_out":
            return swap_last(_expect(name, weight, swapped))
        if layout == "auto" and shape == swapped:
            other = sibling.format(**indices)
            if _get(tensors, other).shape != sibling_shape(shape):
                raise CheckpointError(
                    f"tensor {name} is square, {list(weight.shape)}, so its layout is ambiguous "
                    "(--expert-layout out_in or in_out says which)"
                )
        elif layout == "auto" and weight.shape == swapped:
            return swap_last(weight)
        return _expect(name, weight, shape)

    return source


def _stacked(*patterns: str) -> Source:
    """One tensor per expert, {e}, and per part: equal parts joined (gate rows, then up rows), the experts stacked."""

    def source(tensors: Mapping[str, Weight], indices: Mapping[str, str], shape: Shape, layout: str) -> Weight:
        if layout != "auto":
            name = patterns[0].format(e=0, **indices)
            raise CheckpointError(f"--expert-layout {layout} is for fused experts, {name} is a tensor of one expert")
        part, experts = (shape[1] // len(patterns), *shape[2:]), []
        for e in range(shape[0]):
            names = [pattern.format(e=e, **indices) for pattern in patterns]
            experts.append(Concat([_expect(name, _get(tensors, name), part) for name in names]))
        return Stack(experts)

    return source
