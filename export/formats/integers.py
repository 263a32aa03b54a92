"""int8 and int4: symmetric integers, each group's scale searched for the least squared error.

A value is (code - zero) * scale with zero = 2**(bits - 1), codes unsigned, as ONNX Runtime's MatMulNBits and QMoE
expect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moevlm.export.formats.base import TINY, Array, grouped, held

SMALLEST_GROUP = 16
# Where the value of largest magnitude may land, in steps from zero towards the longer end. Beyond 2**(bits - 1) it is
# clipped and the others get finer steps; short of that, values of the other sign are clipped less. Against rounding to
# the nearest with 2**(bits - 1) alone: squared error -12 % at 4 bits, -17 % at 8, in groups of 32; twice to 10 times
# as many candidates gain less than 1 % at 4 bits.
CANDIDATES = {4: (7.0, 7.4, 7.7, 8.0, 8.3, 8.6, 9.1, 9.6), 8: (122.0, 124.0, 126.0, 127.0, 128.0)}
CHUNK = 1 << 17  # values at a time: large enough to hide numpy's calls, small enough for the L2 cache


@dataclass(frozen=True)
class IntFormat:
    """A `WeightFormat` of integers. bits: 4 or 8.

    zeros: each group has a zero of its own, which only a checkpoint's codes come with: `encode` is symmetric.
    """

    bits: int
    group_size: int
    scales: str = "float32"
    zeros: bool = False

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def fit(self, width: int) -> IntFormat | None:
        """This format, or one with smaller groups, whose groups divide `width`; None if 16 does not."""
        size = self.group_size
        while width % size:
            size //= 2
        return replace(self, group_size=size) if size >= SMALLEST_GROUP else None

    def encode(self, rows: Array) -> tuple[Array, Array]:
        """As `WeightFormat.encode`. A scale may be negative: the largest magnitude goes to the longer end, -zero."""
        groups = grouped(rows, self.group_size)
        flat = groups.reshape(-1, self.group_size)
        codes, scales = np.empty(flat.shape, np.uint8), np.empty(len(flat), np.float32)
        step = max(1, CHUNK // self.group_size)
        for i in range(0, len(flat), step):
            codes[i : i + step], scales[i : i + step] = _search(flat[i : i + step], self.bits)
        if not np.isfinite(scales).all():
            raise ValueError("values that are infinite or not a number cannot be quantized")
        return codes.reshape(groups.shape), held(scales, self.scales).reshape(groups.shape[:2])

    @property
    def zero(self) -> int:
        """The code of 0, in a group without a zero of its own."""
        return 1 << (self.bits - 1)

    def decode(self, codes: Array, scales: Array, zeros: Array | None = None) -> Array:
        """As `WeightFormat.decode`."""
        zero = np.float32(self.zero) if zeros is None else zeros.astype(np.float32)[..., None]
        values = (codes.astype(np.float32) - zero) * scales.astype(np.float32)[..., None]
        return values.reshape(*scales.shape[:-1], -1)


def _search(x: Array, bits: int) -> tuple[Array, Array]:
    """x [G, group_size] float32 -> codes uint8, scales [G] float32, the best of CANDIDATES for each group.

    For given integers q the best scale is <x, q> / <q, q>, and the squared error is then |x|^2 - <x, q>^2 / <q, q>
    (least squares). So each candidate gives integers, and those with the largest <x, q>^2 / <q, q> are kept.
    """
    zero = 1 << (bits - 1)
    low, high = x.min(1), x.max(1)
    peak = np.where(-low >= high, low, high)
    inverse = np.divide(-1, peak, out=np.zeros_like(peak), where=np.abs(peak) > TINY)
    unit = x * inverse[:, None]  # in [-1, 1], the peak at -1
    q = np.empty_like(unit)
    best = np.full(len(x), -1, np.float32)
    chosen, scales = np.zeros_like(peak), np.zeros_like(peak)
    for reach in CANDIDATES[bits]:
        _round(unit, np.float32(reach), zero, q)
        dot, square = np.vecdot(unit, q), np.vecdot(q, q)
        scale = dot / np.maximum(square, 1)
        gain = dot * scale
        better = gain > best
        for kept, found in ((best, gain), (chosen, np.float32(reach)), (scales, scale)):
            np.copyto(kept, found, where=better)
    _round(unit, chosen[:, None], zero, q)
    return (q + zero).astype(np.uint8), scales * -peak


def _round(unit: Array, reach: Array | np.float32, zero: int, out: Array) -> None:
    """out = unit * reach to the nearest integer in -zero .. zero - 1."""
    np.multiply(unit, reach, out=out)
    np.rint(out, out=out)
    np.clip(out, -zero, zero - 1, out=out)
