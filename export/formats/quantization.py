"""Weight-only quantization: symmetric integers in blocks along the input axis, one scale per block.

A value is (q - zero) * scale with zero = 2**(bits - 1), q unsigned, as ONNX Runtime's MatMulNBits and QMoE expect.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moevlm.export.graph.weights import PerRow, Weight

SMALLEST_BLOCK = 16
# Where the value of largest magnitude may land, in steps from zero towards the longer end. Beyond 2**(bits - 1) it is
# clipped and the others get finer steps; short of that, values of the other sign are clipped less. Against rounding to
# the nearest with 2**(bits - 1) alone: squared error -12 % at 4 bits, -17 % at 8, in blocks of 32; twice to 10 times
# as many candidates gain less than 1 % at 4 bits.
CANDIDATES = {4: (7.0, 7.4, 7.7, 8.0, 8.3, 8.6, 9.1, 9.6), 8: (122.0, 124.0, 126.0, 127.0, 128.0)}
CHUNK = 1 << 17  # values at a time: large enough to hide numpy's calls, small enough for the L2 cache
TINY = 1e-30  # blocks below this are zeros: their inverse would overflow


Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
Shaped = tuple[tuple[int, ...], np.dtype]


@dataclass(frozen=True)
class Scheme:
    """bits: 4 or 8. block: weights that share a scale, along the input axis."""

    bits: int
    block: int

    def fit(self, width: int) -> "Scheme | None":
        """This scheme, or one with smaller blocks, whose blocks divide `width`; None if 16 does not."""
        block = self.block
        while width % block:
            block //= 2
        return Scheme(self.bits, block) if block >= SMALLEST_BLOCK else None


def quantize(rows: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """rows [n, K] -> q [n, K / block, block] uint8, not packed, and scales [n, K / block] float32.

    K is padded with zeros to whole blocks. Each block's scale is searched for the least squared error, see `_search`;
    it may be negative: the value of largest magnitude is mapped to the longer end, -zero.
    Raises ValueError where a weight is infinite or not a number.
    """
    n, width = rows.shape
    blocks = -(-width // scheme.block)
    if width % scheme.block:
        rows = np.pad(rows, ((0, 0), (0, blocks * scheme.block - width)))
    flat = np.ascontiguousarray(rows, np.float32).reshape(n * blocks, scheme.block)
    q, scales = np.empty(flat.shape, np.uint8), np.empty(len(flat), np.float32)
    step = max(1, CHUNK // scheme.block)
    for i in range(0, len(flat), step):
        q[i : i + step], scales[i : i + step] = _search(flat[i : i + step], scheme.bits)
    if not np.isfinite(scales).all():
        raise ValueError("values that are infinite or not a number cannot be quantized")
    return q.reshape(n, blocks, scheme.block), scales.reshape(n, blocks)


def _search(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """x [B, block] float32 -> q [B, block] uint8, scales [B] float32, the best of CANDIDATES for each block.

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


def _round(unit: np.ndarray, reach: np.ndarray | np.float32, zero: int, out: np.ndarray) -> None:
    """out = unit * reach to the nearest integer in -zero .. zero - 1."""
    np.multiply(unit, reach, out=out)
    np.rint(out, out=out)
    np.clip(out, -zero, zero - 1, out=out)


def dequantize(q: np.ndarray, scales: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The inverse of `quantize`, padding included: [n, K / block * block] float32."""
    values = (q.astype(np.float32) - (1 << (scheme.bits - 1))) * scales[..., None]
    return values.reshape(len(q), -1)


def stored(weight: Weight, scheme: Scheme, scales: np.dtype) -> Weight:
    """A weight [..., K] as kernels see it: quantized, its scales rounded to the dtype `scales`, and back to float32."""

    def through(array: np.ndarray) -> np.ndarray:
        rows = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
        q, found = quantize(rows, scheme)
        return dequantize(q, found.astype(scales).astype(np.float32), scheme)[:, : rows.shape[1]].reshape(array.shape)

    return PerRow(weight, weight.shape, np.dtype(np.float32), through)


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """Activations [..., K] as kernels round them: to int8, with a scale for every `block` of the last axis."""
    width = x.shape[-1]
    padded = np.pad(x.reshape(-1, width), ((0, 0), (0, -width % block))).reshape(-1, block)
    scale = np.abs(padded).max(1, keepdims=True, initial=0) / 127
    values = np.rint(np.divide(padded, scale, out=np.zeros_like(padded), where=scale > TINY)) * scale
    return values.reshape(-1, width + -width % block)[:, :width].reshape(x.shape).astype(x.dtype, copy=False)


def pack(q: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Two 4-bit values to a byte, the even one in the low half; 8-bit values as they are. Last axis [.., block]."""
    return q if scheme.bits == 8 else q[..., 0::2] | q[..., 1::2] << 4


class Coded:
    """The two tensors that a weight [..., K] becomes: `values` and `scales`, one scale per block of K.

    Both come from the source, and quantizing is the slow part of a build: scales found while the values were written
    are kept until they are written in turn, right afterwards.
    """

    def __init__(self, source: Weight, encode: Encode, values: Shaped, scales: Shaped) -> None:
        """encode: rows [n, K] float32 -> values and scales of n rows. values, scales: what the tensors will be."""
        self._source, self._encode, self._values_of, self._scales_of = source, encode, values, scales
        self._kept: np.ndarray | None = None
        self.values: Weight = _Part(*values, self._values)
        self.scales: Weight = _Part(*scales, self._scales)

    def _both(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        piece = self._source.rows(start, stop)
        found = self._encode(piece.reshape(-1, piece.shape[-1]).astype(np.float32, copy=False))
        values, scales = (
            array.reshape(stop - start, *shape[1:]).astype(dtype, copy=False)
            for array, (shape, dtype) in zip(found, (self._values_of, self._scales_of), strict=True)
        )
        return values, scales

    def _values(self, start: int, stop: int) -> np.ndarray:
        values, scales = self._both(start, stop)
        if self._kept is None:
            self._kept = np.full(self._scales_of[0], np.nan, self._scales_of[1])
        self._kept[start:stop] = scales
        return values

    def _scales(self, start: int, stop: int) -> np.ndarray:
        if self._kept is None or np.isnan(self._kept[start:stop]).any():
            return self._both(start, stop)[1]
        scales = self._kept[start:stop].copy()
        if stop == len(self._kept):
            self._kept = None
        return scales


class Quantized(Coded):
    """`values` [..., K / block, block * bits / 8] uint8 and `scales` [..., K / block] float32."""

    def __init__(self, source: Weight, scheme: Scheme, flat: bool = False) -> None:
        """flat: values are [..., K * bits / 8] instead."""
        *outer, width = source.shape
        blocks, blob = -(-width // scheme.block), scheme.block * scheme.bits // 8
        last = (blocks * blob,) if flat else (blocks, blob)

        def encode(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            q, scales = quantize(rows, scheme)
            return pack(q, scheme), scales

        shapes = ((*outer, *last), np.dtype(np.uint8)), ((*outer, blocks), np.dtype(np.float32))
        super().__init__(source, encode, *shapes)


@dataclass(frozen=True)
class _Part:
    """A weight that is made by a function of the rows asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]
