"""Weights as lazy tensors that are quantized or pruned as they are read."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moevlm.export.formats.base import WeightFormat
from moevlm.export.formats.sparsity import prune
from moevlm.export.formats.stored import EncodedFrom, encoded
from moevlm.export.graph.weights import PerRow, Weight

Pack = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Shaped = tuple[tuple[int, ...], np.dtype]


def as_stored(weight: Weight, form: WeightFormat) -> Weight:
    """A weight [..., K] as kernels see it: encoded and decoded again, float32."""

    def rows(start: int, stop: int) -> np.ndarray:
        found = encoded(weight, form, start, stop)
        zeros = {} if found.zeros is None else {"zeros": found.zeros}
        decoded = form.decode(found.codes, found.scales, **zeros)
        return decoded[:, : weight.shape[-1]].reshape(-1, *weight.shape[1:])

    return _Part(weight.shape, np.dtype(np.float32), rows)


def pruned(weight: Weight) -> Weight:
    """A weight [N, K] pruned as it is read."""
    return PerRow(weight, weight.shape, weight.dtype, prune)


class Encoded:
    """The two tensors that a weight [..., K] becomes: `values` and `scales`, one scale per group of K.

    Both come from the source, and quantizing is the slow part of a build: scales found while the values were written
    are kept until they are written in turn, right afterwards.
    """

    def __init__(self, source: Weight, form: WeightFormat, pack: Pack, values: Shaped, scales: Shaped) -> None:
        """pack: codes and scales of n rows, as `form` encodes them, to their bytes. values, scales: of the tensors."""
        self._source, self._form, self._pack = source, form, pack
        self._values_of, self._scales_of = values, scales
        self._kept: np.ndarray | None = None
        self.values: Weight = _Part(*values, self._values, EncodedFrom(source, form))
        self.scales: Weight = _Part(*scales, self._scales)

    def _both(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        rows = encoded(self._source, self._form, start, stop)
        found = self._pack(rows.codes, rows.scales)
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


@dataclass(frozen=True)
class _Part:
    """A weight that is made by a function of the rows asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]
    encoding: EncodedFrom | None = None
