"""What a weight format is: numbers of few bits in groups along the input axis, one scale per group."""

from __future__ import annotations

from typing import Protocol

import numpy as np

Array = np.ndarray
TINY = 1e-30  # groups below this are zeros: their inverse would overflow


class WeightFormat(Protocol):
    """How rows of weights are stored; the bytes' order is a packing's concern.

    name: as targets and options have it. bits: of one weight. group_size: weights of a row that share a scale.
    scales: the dtype that scales are rounded to.
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def scales(self) -> str: ...

    def encode(self, rows: Array) -> tuple[Array, Array]:
        """rows [n, K] -> codes [n, groups, group_size] uint8, one to a byte, and scales [n, groups] float32.

        K is padded with zeros to whole groups; scales are numbers that their dtype holds. Raises ValueError where a
        weight is infinite or not a number, or its group's scale is beyond the dtype.
        """
        ...

    def decode(self, codes: Array, scales: Array, zeros: Array | None = None) -> Array:
        """codes [..., groups, group_size], scales and zeros [..., groups] -> [..., groups * group_size] float32.

        zeros: the codes that stand for 0 in each group, of a format that has some.
        """
        ...


def grouped(rows: Array, group_size: int) -> Array:
    """rows [n, K] -> [n, groups, group_size] float32, the last group padded with zeros."""
    n, width = rows.shape
    if width % group_size:
        rows = np.pad(rows, ((0, 0), (0, -width % group_size)))
    return np.ascontiguousarray(rows, np.float32).reshape(n, -1, group_size)


def in_units(values: Array, scales: Array) -> Array:
    """values [..., size] over their scales [...], which are not negative; 0 where a scale is 0."""
    scales = scales[..., None]
    return np.divide(values, scales, out=np.zeros_like(values), where=scales > 0)


def rounded(values: Array, dtype: str) -> Array:
    """values as `dtype` (float32, float16, bfloat16) holds them, to nearest even: float32.

    As E4M3 they stay what they are: products of two levels, which are stored.
    """
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values


def held(scales: Array, dtype: str) -> Array:
    """Scales rounded to `dtype`, float32. Raises ValueError for one that is beyond it."""
    found = rounded(scales, dtype)
    if not (finite := np.isfinite(found)).all():
        raise ValueError(f"the scale of a group is {scales[~finite][0]:.3g} (allowed: finite in {dtype})")
    return found
