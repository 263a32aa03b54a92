"""Weights that a checkpoint holds in codes: what a code stands for, and how codes follow rearrangements of a weight.

A weight [..., N, K] has one code for each number; neighbours along K are a group with one scale. Whoever can store the
same codes takes them by `coded` and `Coded.codes`, without a second rounding; for all others `rows` decodes them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from moevlm.export.graph.rearranged import Picked, Reordered, RowBlocks, Swapped
from moevlm.export.graph.weights import Concat, Stack, Weight

FLOAT = np.dtype(np.float32)
_MINIFLOATS = {"fp8": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2, "fp4": ml_dtypes.float4_e2m1fn}
_INTEGERS = {"int4": 4, "int8": 8}
_CHUNK = 1 << 16  # codes at a time: their numbers stay in the L2 cache while zeros and scales are applied


@dataclass(frozen=True)
class CodeForm:
    """What the codes of a weight stand for: (number - zero) * scale, in float32.

    kind: fp8 (e4m3), fp8_e5m2, fp4 (e2m1), whose codes are the bits of such a number and whose zero is 0; int4, int8,
    whose number is the code itself, without a sign. group_size: neighbours in a row that share a scale. block_rows:
    rows, counted from the first of [N, K], that share it, too. zeros: each group has a zero of its own; otherwise the
    zero of integers is 2 ** (bits - 1). scales: a dtype that holds every scale, float32 where no smaller one is known
    to.
    """

    kind: str
    group_size: int
    block_rows: int = 1
    zeros: bool = False
    scales: str = "float32"

    @property
    def bits(self) -> int:
        """Of one code."""
        return _INTEGERS.get(self.kind) or (4 if self.kind == "fp4" else 8)

    @property
    def numbers(self) -> np.ndarray:
        """The number of each code, a zero that is common to all subtracted: [256] float32."""
        return _numbers(self.kind, self.zeros)

    @property
    def code_of_zero(self) -> int:
        """The code of the weight 0 where a group has no zero of its own."""
        return 1 << (self.bits - 1) if self.kind in _INTEGERS else 0


@dataclass(frozen=True)
class Codes:
    """Rows in codes. codes [n, ..., groups, group_size] uint8, one to a byte; scales and zeros [n, ..., groups].

    scales: float32. zeros: uint8, None where `CodeForm.zeros` is false. The last group is filled up where the group
    size does not divide K: what stands there is nothing.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None


class Coded(ABC):
    """A `Weight` [..., N, K], float32, that is held in codes."""

    if TYPE_CHECKING:  # a subclass has them as fields or as properties

        @property
        def shape(self) -> tuple[int, ...]: ...
        @property
        def form(self) -> CodeForm: ...

    @abstractmethod
    def codes(self, start: int, stop: int) -> Codes:
        """Rows [start:stop] of the first axis as they are stored."""

    @property
    def kind(self) -> str:
        """What the codes are, in words."""
        return self.form.kind + (" with zeros" if self.form.zeros else "")

    @property
    def dtype(self) -> np.dtype:
        return FLOAT

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start:stop] of the first axis, decoded."""
        return decode(self.codes(start, stop), self.form, self.shape[-1])


def decode(found: Codes, form: CodeForm, width: int) -> np.ndarray:
    """What codes stand for: [n, ..., width] float32, each product of number and scale rounded once."""
    *outer, groups, size = found.codes.shape
    codes = np.ascontiguousarray(found.codes).reshape(-1, size)
    scales = found.scales.reshape(-1, 1)
    zeros = None if found.zeros is None else found.zeros.reshape(-1, 1).astype(FLOAT)
    values, step = np.empty(codes.shape, FLOAT), max(1, _CHUNK // max(1, size))
    for i in range(0, len(codes), step):
        piece = slice(i, i + step)
        _look_up(codes[piece], form, values[piece])
        if zeros is not None:
            values[piece] -= zeros[piece]
        values[piece] *= scales[piece]
    values = values.reshape(*outer, groups * size)
    return values if groups * size == width else np.ascontiguousarray(values[..., :width])


def numbers_of(codes: np.ndarray, form: CodeForm) -> np.ndarray:
    """The number of each code, see `CodeForm.numbers`: float32 of the same shape."""
    values = np.empty(codes.shape, FLOAT)
    _look_up(np.ascontiguousarray(codes), form, values)
    return values


def _look_up(codes: np.ndarray, form: CodeForm, out: np.ndarray) -> None:
    if codes.size % 2:
        np.take(form.numbers, codes, out=out, mode="clip")
    else:  # two at a time: a third faster
        pairs = out.reshape(-1).view(np.float64)
        np.take(_pairs(form.kind, form.zeros), codes.reshape(-1).view("<u2"), out=pairs, mode="clip")


@cache
def _numbers(kind: str, zeros: bool) -> np.ndarray:
    codes = np.arange(256, dtype=np.uint8)
    if kind in _INTEGERS:
        numbers = codes.astype(FLOAT) - (0 if zeros else 1 << (_INTEGERS[kind] - 1))
    else:
        numbers = (codes & 15 if kind == "fp4" else codes).view(_MINIFLOATS[kind]).astype(FLOAT)
    numbers.setflags(write=False)
    return numbers


@cache
def _pairs(kind: str, zeros: bool) -> np.ndarray:
    """The numbers of two codes, 8 bytes that stand in the place of a float64, for each 16 bits."""
    numbers, codes = _numbers(kind, zeros), np.arange(1 << 16)
    pairs = np.stack([numbers[codes & 255], numbers[codes >> 8]], 1).view(np.float64).reshape(-1)
    pairs.setflags(write=False)
    return pairs


def grouped(codes: np.ndarray, group_size: int) -> np.ndarray:
    """codes [..., K] -> [..., groups, group_size], the last group filled up with zeros."""
    *outer, width = codes.shape
    if width % group_size:
        codes = np.pad(codes, [*((0, 0) for _ in outer), (0, -width % group_size)])
    return codes.reshape(*outer, -1, group_size)


def coded(weight: Weight) -> Coded | None:
    """The same weight in codes, where it is held so and every rearrangement on its way moves whole codes; else None."""
    match weight:
        case Coded():
            return weight
        case Concat(sources) | Stack(sources):
            found = [coded(source) for source in sources]
            parts = [part for part in found if part is not None]
            if len(parts) < len(found) or len({replace(part.form, block_rows=1, scales="") for part in parts}) > 1:
                return None
            if isinstance(weight, Stack):
                return _Stacked(parts) if len({part.form.block_rows for part in parts}) == 1 else None
            return _Joined(parts)
        case Swapped(source):
            whole = coded(source)  # blocks of one row would become groups of one weight
            turns = whole is not None and not whole.form.zeros and whole.form.block_rows > 1
            return _Turned(whole) if whole is not None and turns else None
        case Picked(source):
            whole = coded(source)
            return _Picked(whole, weight) if whole is not None and len(weight.shape) == 3 else None
        case RowBlocks(source):
            whole = coded(source)
            return _RowBlocks(whole, weight) if whole is not None and len(weight.shape) == 2 else None
        case Reordered(source):
            whole = coded(source)
            return _Reordered(whole, weight) if whole is not None and len(weight.shape) == 2 else None
    return None


@dataclass(frozen=True)
class _Joined(Coded):
    """Parts one after the other along the first axis."""

    parts: Sequence[Coded]

    @property
    def shape(self) -> tuple[int, ...]:
        return Concat(self.parts).shape

    @property
    def form(self) -> CodeForm:
        form, matrices = _common(self.parts), len(self.shape) == 2
        whole = not matrices or all(part.shape[0] % form.block_rows == 0 for part in self.parts[:-1])
        same = all(part.form.block_rows == form.block_rows for part in self.parts)
        return form if whole and same else replace(form, block_rows=1)

    def codes(self, start: int, stop: int) -> Codes:
        pieces, offset = [], 0
        for part in self.parts:
            a, b = max(start - offset, 0), min(stop - offset, part.shape[0])
            if a < b:
                pieces.append(part.codes(a, b))
            offset += part.shape[0]
        return _together(pieces, np.concatenate)


@dataclass(frozen=True)
class _Stacked(Coded):
    """Parts under a new first axis."""

    parts: Sequence[Coded]

    @property
    def shape(self) -> tuple[int, ...]:
        return Stack(self.parts).shape

    @property
    def form(self) -> CodeForm:
        return _common(self.parts)

    def codes(self, start: int, stop: int) -> Codes:
        return _together([part.codes(0, part.shape[0]) for part in self.parts[start:stop]], np.stack)


@dataclass(frozen=True)
class _Turned(Coded):
    """[e, m, n] as [e, n, m]: a block of block_rows x group_size turns with its scale."""

    part: Coded

    @property
    def shape(self) -> tuple[int, ...]:
        e, m, n = self.part.shape
        return e, n, m

    @property
    def form(self) -> CodeForm:
        form = self.part.form
        return replace(form, group_size=form.block_rows, block_rows=form.group_size)

    def codes(self, start: int, stop: int) -> Codes:
        found, form, (_, _, n) = self.part.codes(start, stop), self.form, self.part.shape
        flat = found.codes.reshape(*found.codes.shape[:2], -1)[..., :n]
        codes = grouped(flat.swapaxes(1, 2), form.group_size)
        blocks = found.scales[:, :: form.group_size].swapaxes(1, 2)
        return Codes(np.ascontiguousarray(codes), np.repeat(blocks, form.block_rows, 1)[:, :n])


@dataclass(frozen=True)
class _Picked(Coded):
    """Some rows of each matrix of [e, m, n]."""

    part: Coded
    picked: Picked

    @property
    def shape(self) -> tuple[int, ...]:
        return self.picked.shape

    @property
    def form(self) -> CodeForm:
        form, places = self.part.form, self.picked.places
        aligned = isinstance(places, range) and places.step == 1 and places.start % form.block_rows == 0
        return form if aligned else replace(form, block_rows=1)

    def codes(self, start: int, stop: int) -> Codes:
        found, pick = self.part.codes(start, stop), self.picked.pick
        return Codes(pick(found.codes), pick(found.scales), None if found.zeros is None else pick(found.zeros))


@dataclass(frozen=True)
class _RowBlocks(Coded):
    """Blocks of rows of a matrix, at equal distances."""

    part: Coded
    blocks: RowBlocks

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape

    @property
    def form(self) -> CodeForm:
        form, blocks = self.part.form, self.blocks
        aligned = not any(number % form.block_rows for number in (blocks.size, blocks.every, blocks.first))
        return form if aligned else replace(form, block_rows=1)

    def codes(self, start: int, stop: int) -> Codes:
        return _together([self.part.codes(a, b) for a, b in self.blocks.places(start, stop)], np.concatenate)


@dataclass(frozen=True)
class _Reordered(Coded):
    """Each group of so many rows of a matrix in another order."""

    part: Coded
    reordered: Reordered

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    @property
    def form(self) -> CodeForm:
        form = self.part.form
        stays = form.block_rows % len(self.reordered.order) == 0  # each row, in its block
        return form if stays else replace(form, block_rows=1)

    def codes(self, start: int, stop: int) -> Codes:
        first, last = self.reordered.groups(start, stop)
        found = self.part.codes(first, last)

        def turned(array: np.ndarray) -> np.ndarray:
            return self.reordered.turned(array)[start - first : stop - first]

        return Codes(turned(found.codes), turned(found.scales), None if found.zeros is None else turned(found.zeros))


def _common(parts: Sequence[Coded]) -> CodeForm:
    """The form of the first, with scales that hold those of all."""
    scales = {part.form.scales for part in parts}
    return replace(parts[0].form, scales=scales.pop() if len(scales) == 1 else "float32")


def _together(pieces: list[Codes], join: Callable[[list[np.ndarray]], np.ndarray]) -> Codes:
    zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
    codes, scales = join([piece.codes for piece in pieces]), join([piece.scales for piece in pieces])
    return Codes(codes, scales, join(zeros) if zeros else None)
