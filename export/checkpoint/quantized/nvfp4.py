"""NVFP4: e2m1 numbers in groups of 16 with an e4m3 scale, and one float32 scale for the whole tensor.

ModelOpt: value = number * (weight_scale * weight_scale_2). compressed-tensors stores the inverse, weight_global_scale:
value = number * (weight_scale / weight_global_scale).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moevlm.export.checkpoint.quantized.layout import Format, Parts, Spelling, matrix_shape, wrong_value
from moevlm.export.checkpoint.quantized.nibbles import nibbles
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.codes import FLOAT, Coded, CodeForm, Codes, grouped
from moevlm.export.graph.weights import Weight

_GROUP = 16


@dataclass(frozen=True)
class NVFP4(Coded):
    """packed [.., N, K / 2], scales [.., N, K / 16], of_all: one for the tensor or for each expert."""

    packed: Stored
    scales: Stored
    of_all: Stored
    divides: bool

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, half = self.packed.shape
        return (*outer, 2 * half)

    @property
    def form(self) -> CodeForm:
        return CodeForm("fp4", _GROUP)

    def codes(self, start: int, stop: int) -> Codes:
        scales, of_all = self.scales.rows(start, stop).astype(FLOAT), self._of_all(start, stop)
        scales = scales / of_all if self.divides else scales * of_all
        return Codes(grouped(nibbles(self.packed.rows(start, stop)), _GROUP), scales)

    def _of_all(self, start: int, stop: int) -> np.ndarray:
        each = len(self.shape) == 3 and self.of_all.shape[:1] == self.shape[:1]
        found = self.of_all.rows(start, stop) if each else self.of_all.rows(0, 1)
        if self.divides and not found.all():
            raise wrong_value(self.of_all, 0, "a number other than 0, for it divides")
        return found.reshape(-1, *(1 for _ in self.shape[1:]))


def _reader(divides: bool) -> Callable[[Parts], Weight]:
    def read(parts: Parts) -> Weight:
        packed, scales = parts["codes"], parts.of_dtype("scale", "float8_e4m3fn")
        outer, n, half = matrix_shape(packed)
        whole = tuple(1 for _ in outer)
        each = [(*outer, *(1 for _ in range(rank))) for rank in range(3)] if outer else []
        parts.of_shape("scale", (*outer, n, -(-2 * half // _GROUP)))
        parts.of_dtype("global", "float32")
        parts.of_shape("global", (), (1,), *each, (*whole, 1, 1))
        return NVFP4(packed, scales, parts["global"], divides)

    return read


MODELOPT = Format(
    "nvfp4",
    ("uint8",),
    (
        Spelling("", {"scale": "_scale", "global": "_scale_2"}),
        Spelling("", {"scale": "_weight_scale", "global": "_weight_scale_2"}),
    ),
    _reader(divides=False),
)
COMPRESSED_TENSORS = Format(
    "nvfp4", ("uint8",), (Spelling("_packed", {"scale": "_scale", "global": "_global_scale"}),), _reader(divides=True)
)
