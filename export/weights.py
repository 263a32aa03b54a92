"""Weights as recipes: where the bytes lie and how they are rearranged, read only when an engine file is written.

A `Weight` is read in slices along its first axis, so a [128, 1536, 2048] expert tensor passes through memory a few
experts at a time. Every rearrangement is another `Weight` around the first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

SLICE_BYTES = 32 << 20


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
        return self.array[start:stop]


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
class Whole:
    """`function` applied to the whole source: for small tensors and for 2-D transposes."""

    source: Weight
    shape: tuple[int, ...]
    dtype: np.dtype
    function: Callable[[np.ndarray], np.ndarray]

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.function(self.source.rows(0, self.source.shape[0]))[start:stop]


@dataclass(frozen=True)
class Concat:
    """Sources one after the other along the first axis."""

    sources: Sequence[Weight]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(s.shape[0] for s in self.sources), *self.sources[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.sources[0].dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        parts, offset = [], 0
        for source in self.sources:
            a, b = max(start - offset, 0), min(stop - offset, source.shape[0])
            if a < b:
                parts.append(source.rows(a, b))
            offset += source.shape[0]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class Stack:
    """Sources of one shape under a new first axis: experts that are stored one by one become [E, ...]."""

    sources: Sequence[Weight]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sources), *self.sources[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.sources[0].dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        return np.stack([s.rows(0, s.shape[0]) for s in self.sources[start:stop]])


def cast(source: Weight, dtype: np.dtype) -> Weight:
    """The same values in another dtype."""
    dtype = np.dtype(dtype)
    if source.dtype == dtype:
        return source
    return PerRow(source, source.shape, dtype, lambda a: _convert(a, dtype))


def _convert(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # bfloat16 is the upper half of a float32; shifting the bits is several times faster than an element-wise cast.
    if array.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype)


def transpose(source: Weight) -> Weight:
    """[m, n] -> [n, m]."""
    m, n = source.shape
    return Whole(source, (n, m), source.dtype, lambda a: np.ascontiguousarray(a.T))


def swap_last(source: Weight) -> Weight:
    """[e, m, n] -> [e, n, m], slice by slice."""
    e, m, n = source.shape
    return PerRow(source, (e, n, m), source.dtype, lambda a: np.ascontiguousarray(a.swapaxes(1, 2)))


def reshape(source: Weight, shape: tuple[int, ...]) -> Weight:
    """The same values in row-major order under another shape with the same first axis."""
    return PerRow(source, shape, source.dtype, lambda a: a.reshape(len(a), *shape[1:]))


def slices(weight: Weight) -> Iterator[np.ndarray]:
    """The whole tensor in order, in contiguous pieces of about SLICE_BYTES (a 0-d tensor is one piece)."""
    if not weight.shape:
        yield np.ascontiguousarray(weight.rows(0, 1))
        return
    if isinstance(weight, Whole):
        yield np.ascontiguousarray(weight.rows(0, weight.shape[0]))
        return
    row_bytes = max(1, int(np.prod(weight.shape[1:])) * weight.dtype.itemsize)
    step = max(1, SLICE_BYTES // row_bytes)
    for start in range(0, weight.shape[0], step):
        yield np.ascontiguousarray(weight.rows(start, min(start + step, weight.shape[0])))


class WeightTensor(ir.LazyTensor):
    """An ONNX initializer whose bytes come from a `Weight`; nothing is read until it is written or asked for."""

    __slots__ = ("weight",)

    def __init__(self, name: str, weight: Weight) -> None:
        super().__init__(
            self._read, dtype=ir.DataType.from_numpy(weight.dtype), shape=ir.Shape(weight.shape), cache=False, name=name
        )
        self.weight = weight

    def _read(self) -> ir.Tensor:
        return ir.Tensor(np.concatenate([np.atleast_1d(s) for s in slices(self.weight)]).reshape(self.weight.shape))


def initializer(name: str, weight: Weight) -> ir.Value:
    """A graph initializer that holds `weight`."""
    tensor = WeightTensor(name, weight)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
