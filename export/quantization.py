"""Weight-only quantization: symmetric integers in blocks along the input axis, one scale per block.

A value is (q - zero) * scale with zero = 2**(bits - 1), q unsigned, as ONNX Runtime's MatMulNBits and QMoE expect.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moevlm.export.weights import Weight

SMALLEST_BLOCK = 16


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

    K is padded with zeros to whole blocks. The scale maps the value of largest magnitude to the longer end, -zero, so
    all 2**bits values are of use.
    """
    n, width = rows.shape
    blocks, zero = -(-width // scheme.block), 1 << (scheme.bits - 1)
    padded = np.zeros((n, blocks * scheme.block), np.float32)
    padded[:, :width] = rows
    padded = padded.reshape(n, blocks, scheme.block)
    low, high = padded.min(-1), padded.max(-1)
    scales = np.where(-low > high, low, high) / -zero
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    q = np.rint(padded * inverse[..., None]) + zero
    return np.clip(q, 0, 2 * zero - 1).astype(np.uint8), scales


def dequantize(q: np.ndarray, scales: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The inverse of `quantize`, padding included: [n, K / block * block] float32."""
    values = (q.astype(np.float32) - (1 << (scheme.bits - 1))) * scales[..., None]
    return values.reshape(len(q), -1)


def pack(q: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Two 4-bit values to a byte, the even one in the low half; 8-bit values as they are. Last axis [.., block]."""
    return q if scheme.bits == 8 else q[..., 0::2] | q[..., 1::2] << 4


class Quantized:
    """The two tensors that a weight [..., K] becomes: `values` [..., K / block, block * bits / 8] and `scales`.

    Both come from the source, and quantizing is the slow part of a build: scales found while the values were written
    are kept until they are written in turn, right afterwards.
    """

    def __init__(self, source: Weight, scheme: Scheme, flat: bool = False) -> None:
        """flat: values are [..., K * bits / 8] instead."""
        *outer, width = source.shape
        blocks, blob = -(-width // scheme.block), scheme.block * scheme.bits // 8
        self._source, self._scheme = source, scheme
        self._shape = (*outer, blocks)
        self._kept: np.ndarray | None = None
        last = (blocks * blob,) if flat else (blocks, blob)
        self.values: Weight = _Part((*outer, *last), np.dtype(np.uint8), self._values)
        self.scales: Weight = _Part(self._shape, np.dtype(np.float32), self._scales)

    def _quantize(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        piece = self._source.rows(start, stop)
        q, scales = quantize(piece.reshape(-1, piece.shape[-1]).astype(np.float32, copy=False), self._scheme)
        shape = (stop - start, *self._shape[1:])
        return q.reshape(*shape, self._scheme.block), scales.reshape(shape)

    def _values(self, start: int, stop: int) -> np.ndarray:
        q, scales = self._quantize(start, stop)
        if self._kept is None:
            self._kept = np.full(self._shape, np.nan, np.float32)
        self._kept[start:stop] = scales
        return pack(q, self._scheme).reshape(stop - start, *self.values.shape[1:])

    def _scales(self, start: int, stop: int) -> np.ndarray:
        if self._kept is None or np.isnan(self._kept[start:stop]).any():
            return self._quantize(start, stop)[1]
        scales = self._kept[start:stop].copy()
        if stop == self._shape[0]:
            self._kept = None
        return scales


@dataclass(frozen=True)
class _Part:
    """A weight that is made by a function of the rows asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]
