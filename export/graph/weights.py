"""Weights as recipes: where the bytes lie and how they are rearranged, read only when an engine file is written.

A `Weight` is read in slices along its first axis, so a [128, 1536, 2048] expert tensor passes through memory a few
experts at a time. Every rearrangement is another `Weight` around the first.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from moevlm.runtime.core.errors import BuildError

# Small enough that a slice stays in the CPU's cache on its way from the file through a cast to the engine file, and
# that malloc reuses its memory: at 32 MiB every slice is mapped afresh, and bf16 -> fp32 runs at a fifth of the speed.
SLICE_BYTES = 4 << 20


class Weight(Protocol):
    """A tensor that is not in memory. `rows(a, b)` reads [a:b] of the first axis as a fresh array of `dtype`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def rows(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Constant:
    """An array that is already in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop] if self.array.shape else self.array


@dataclass(frozen=True)
class PerRow:
    """`function` applied to slices of the first axis: [n, *source.shape[1:]] -> [n, *shape[1:]], each row alone."""

    source: Weight
    shape: tuple[int, ...]
    dtype: np.dtype
    function: Callable[[np.ndarray], np.ndarray]

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.function(self.source.rows(start, stop))


@dataclass(frozen=True)
class Sum:
    """Two weights of one shape, added in float32."""

    first: Weight
    second: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def rows(self, start: int, stop: int) -> np.ndarray:
        first, second = (part.rows(start, stop).astype(np.float32) for part in (self.first, self.second))
        return first + second


@dataclass(frozen=True)
class ScaledRows:
    """Each row times its factor, in float32. factors: [rows of the source]."""

    source: Weight
    factors: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def rows(self, start: int, stop: int) -> np.ndarray:
        source, factors = (part.rows(start, stop).astype(np.float32) for part in (self.source, self.factors))
        return source * factors.reshape(-1, *[1] * (source.ndim - 1))


@dataclass(frozen=True)
class Concat:
    """Sources one after the other along the first axis."""

    sources: Sequence[Weight]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(s.shape[0] for s in self.sources), *self.sources[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(source.dtype for source in self.sources))

    def rows(self, start: int, stop: int) -> np.ndarray:
        parts = [self.sources[i].rows(a, b) for i, a, b in self.places(start, stop)]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined.astype(self.dtype, copy=False)  # sources may differ in dtype

    def places(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where rows [start:stop] lie: the number of a source, and its rows [a:b], source by source."""
        offset = 0
        for number, source in enumerate(self.sources):
            a, b = max(start - offset, 0), min(stop - offset, source.shape[0])
            if a < b:
                yield number, a, b
            offset += source.shape[0]


@dataclass(frozen=True)
class Stack:
    """Sources of one shape under a new first axis: experts that are stored one by one become [E, ...]."""

    sources: Sequence[Weight]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sources), *self.sources[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(source.dtype for source in self.sources))

    def rows(self, start: int, stop: int) -> np.ndarray:
        stacked = np.stack([s.rows(0, s.shape[0]) for s in self.sources[start:stop]])
        return stacked.astype(self.dtype, copy=False)


@dataclass(frozen=True)
class Cast:
    """The same values in another dtype."""

    source: Weight
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.converted(self.source.rows(start, stop))

    def converted(self, array: np.ndarray) -> np.ndarray:
        """Values of the source in the dtype. Raises ValueError for one that float16 cannot hold."""
        return _float16(array) if self.dtype == np.float16 else array.astype(self.dtype)


def cast(source: Weight, dtype: np.dtype) -> Weight:
    """The same values in another dtype. Reading raises ValueError for one that float16 cannot hold."""
    dtype = np.dtype(dtype)
    return source if source.dtype == dtype else Cast(source, dtype)


def uncast(weight: Weight) -> Weight:
    """The values as they were before a cast."""
    return uncast(weight.source) if isinstance(weight, Cast) else weight


def _float16(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise ValueError(f"float16 has no numbers beyond {np.finfo(np.float16).max:.0f} (use --dtype bf16)")
    return narrow


def slices(weight: Weight) -> Iterator[np.ndarray]:
    """The whole tensor in order, in contiguous pieces of about SLICE_BYTES (a 0-d tensor is one piece)."""
    if not weight.shape:
        yield np.ascontiguousarray(weight.rows(0, 1))
        return
    row_bytes = max(1, math.prod(weight.shape[1:]) * weight.dtype.itemsize)
    step = max(1, SLICE_BYTES // row_bytes)
    for start in range(0, weight.shape[0], step):
        yield np.ascontiguousarray(weight.rows(start, min(start + step, weight.shape[0])))


def read(weight: Weight) -> np.ndarray:
    """The whole tensor in memory."""
    return _joined(slices(weight), weight)


def _joined(pieces: Iterable[np.ndarray], weight: Weight) -> np.ndarray:
    array = np.empty(weight.shape, weight.dtype)
    flat, done = array.reshape(-1), 0
    for piece in pieces:
        flat[done : done + piece.size] = piece.reshape(-1)
        done += piece.size
    return array


class WeightTensor(ir.LazyTensor):
    """An ONNX initializer whose bytes come from a `Weight`; nothing is read until it is written or asked for.

    Reading raises BuildError, by the initializer's name, where a value cannot be what the recipe makes of it.
    """

    __slots__ = ("weight",)

    def __init__(self, name: str, weight: Weight) -> None:
        super().__init__(
            lambda: ir.Tensor(_joined(self.pieces(), weight)),
            dtype=ir.DataType.from_numpy(weight.dtype),
            shape=ir.Shape(weight.shape),
            cache=False,
            name=name,
        )
        self.weight = weight

    def pieces(self) -> Iterator[np.ndarray]:
        """`slices` of the weight."""
        try:
            yield from slices(self.weight)
        except ValueError as error:
            raise BuildError(f"initializer {self.name}: {error}") from error


def initializer(name: str, weight: Weight) -> ir.Value:
    """A graph initializer that holds `weight`."""
    tensor = WeightTensor(name, weight)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def weight_of(value: ir.Value) -> Weight:
    """The recipe of an initializer. Raises BuildError for any other value."""
    tensor = value.const_value
    if tensor is None or not value.is_initializer():
        raise BuildError(f"{value.name}: must be an initializer")
    return tensor.weight if isinstance(tensor, WeightTensor) else Constant(tensor.numpy())
