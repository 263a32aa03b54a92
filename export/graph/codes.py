"""Weights that a checkpoint holds in codes, and what a code stands for.

A weight [..., N, K] has one code for each number; neighbours along K are a group with one scale. Whoever can store the
same codes takes them by `moved_codes.coded` and `Coded.codes`, without a second rounding; for all others `rows` decodes
them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

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
    to; E4M3 where they are in two levels.
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
class Levels:
    """Scales as NVFP4 has them, of which each is one of its group times one of its row.

    groups: [n, ..., groups] uint8, codes of e4m3. rows: [n, ...] float32.
    """

    groups: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Codes:
    """Rows in codes. codes [n, ..., groups, group_size] uint8, one to a byte; scales and zeros [n, ..., groups].

    scales: float32. zeros: uint8, None where `CodeForm.zeros` is false. levels: the scales again, None where they are
    not in two levels. The last group is filled up where the group size does not divide K: what stands there is nothing.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    levels: Levels | None = None

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> "Codes":
        """With each array as `move` rearranges it, by axes that all have."""
        zeros = None if self.zeros is None else move(self.zeros)
        levels = None if self.levels is None else Levels(move(self.levels.groups), move(self.levels.rows))
        return Codes(move(self.codes), move(self.scales), zeros, levels)


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
