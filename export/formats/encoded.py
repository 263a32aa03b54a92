"""Weights as lazy tensors that are quantized or pruned as they are read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from moevlm.export.formats.base import WeightFormat
from moevlm.export.formats.sparsity import prune
from moevlm.export.formats.stored import EncodedFrom
from moevlm.export.graph.codes import Codes
from moevlm.export.graph.weights import PerRow, Weight

Pack = Callable[[Codes], tuple[np.ndarray, ...]]
Shaped = tuple[tuple[int, ...], np.dtype]


def as_stored(weight: Weight, form: WeightFormat) -> Weight:
    """A weight [..., K] as kernels see it: encoded and decoded again, float32."""
    encoding = EncodedFrom(weight, form)

    def rows(start: int, stop: int) -> np.ndarray:
        found = encoding.rows(start, stop)
        decoded = form.decode(found.codes, found.scales, found.zeros)
        return decoded[:, : weight.shape[-1]].reshape(-1, *weight.shape[1:])

    return _Part(weight.shape, np.dtype(np.float32), rows, encoding)


def pruned(weight: Weight) -> Weight:
    """A weight [N, K] pruned as it is read."""
    return PerRow(weight, weight.shape, weight.dtype, prune)


class Encoded:
    """The tensors that a weight [..., K] becomes: values first, then what belongs to each group of K: scales, zeros.

    All come from the source, and quantizing is the slow part of a build: what was found while the values were written
    is kept until it is written in turn, right afterwards.
    """

    def __init__(self, source: Weight, form: WeightFormat, pack: Pack, values: Shaped, *others: Shaped) -> None:
        """pack: n rows as `form` encodes them to the bytes of each tensor. values, others: of the tensors."""
        self._of, self._pack, self._shaped = EncodedFrom(source, form), pack, (values, *others)
        self._kept: dict[int, np.ndarray] = {}
        self._known = np.zeros(source.shape[0], bool)
        self.values: Weight = _Part(*values, self._values, self._of)
        self.others: tuple[Weight, ...] = tuple(
            _Part(*shaped, partial(self._other, i)) for i, shaped in enumerate(others, 1)
        )

    def _all(self, start: int, stop: int) -> list[np.ndarray]:
        found = self._pack(self._of.rows(start, stop))
        return [
            array.reshape(stop - start, *shape[1:]).astype(dtype, copy=False)
            for array, (shape, dtype) in zip(found, self._shaped, strict=True)
        ]

    def _values(self, start: int, stop: int) -> np.ndarray:
        values, *others = self._all(start, stop)
        if not self._kept:
            self._kept = {i: np.empty(*self._shaped[i]) for i in range(1, len(self._shaped))}
        for i, found in enumerate(others, 1):
            if i in self._kept:
                self._kept[i][start:stop] = found
        self._known[start:stop] = True
        return values

    def _other(self, i: int, start: int, stop: int) -> np.ndarray:
        if i not in self._kept or not self._known[start:stop].all():
            return self._all(start, stop)[i]
        found = self._kept[i][start:stop].copy()
        if stop == len(self._kept[i]):
            del self._kept[i]
            if not self._kept:
                self._known[:] = False
        return found


@dataclass(frozen=True)
class _Part:
    """A weight that is made by a function of the rows asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]
    encoding: EncodedFrom | None = None
