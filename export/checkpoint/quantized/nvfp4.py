"""NVFP4: e2m1 numbers in groups of 16 with an e4m3 scale, and one float32 scale for the whole tensor.

ModelOpt: value = number * (weight_scale * weight_scale_2). compressed-tensors stores the inverse, weight_global_scale:
value = number * (weight_scale / weight_global_scale). Fused experts [E, in, out] are packed along their inputs, too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moevlm.export.checkpoint.quantized.layout import Format, Parts, Spelling, matrix_shape, wrong_value
from moevlm.export.checkpoint.quantized.nibbles import nibbles
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.codes import FLOAT, Coded, CodeForm, Codes, Levels, grouped
from moevlm.export.graph.rearranged import Swapped
from moevlm.export.graph.weights import Weight
from moevlm.runtime.core.dtypes import E4M3

_GROUP = 16


@dataclass(frozen=True)
class NVFP4(Coded):
    """packed [.., N, K / 2], scales [.., N, K / 16], of_all: one for the tensor, each expert, or each half of its rows.

    turned: both are stored with their last two axes exchanged, [E, K / 2, N] and [E, K / 16, N].
    """

    packed: Stored
    scales: Stored
    of_all: Stored
    divides: bool
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, n, half = self.packed.shape
        return (*outer, half, 2 * n) if self.turned else (*outer, n, 2 * half)

    @property
    def form(self) -> CodeForm:
        return CodeForm("fp4", _GROUP, scales=E4M3)

    def codes(self, start: int, stop: int) -> Codes:
        packed, found = self.packed.rows(start, stop), self.scales.rows(start, stop)
        if self.turned:
            packed, found = (np.ascontiguousarray(array.swapaxes(1, 2)) for array in (packed, found))
        of_all, scales = self._of_all(start, stop), found.astype(FLOAT)
        factor = 1 / of_all if self.divides else of_all
        levels = Levels(found.view(np.uint8), np.broadcast_to(factor, scales.shape)[..., 0])
        scales = scales / of_all if self.divides else scales * of_all
        return Codes(grouped(nibbles(packed), _GROUP), scales, levels=levels)

    def _of_all(self, start: int, stop: int) -> np.ndarray:
        """To be broadcast with scales [stop - start, .., groups]."""
        each = len(self.shape) == 3 and self.of_all.shape[:1] == self.shape[:1]
        found = self.of_all.rows(start, stop) if each else self.of_all.rows(0, 1)
        if self.divides and not found.all():
            raise wrong_value(self.of_all, 0, "a number other than 0, for it divides")
        if found.size == 2 * (stop - start) and each:  # gate rows, up rows
            return np.repeat(found.reshape(-1, 2), self.shape[1] // 2, 1)[..., None]
        return found.reshape(-1, *(1 for _ in self.shape[1:]))


def _reader(divides: bool) -> Callable[[Parts], Weight]:
    def read(parts: Parts) -> Weight:
        packed, scales = parts["codes"], parts.of_dtype("scale", "float8_e4m3fn")
        outer, rows, columns = matrix_shape(packed)
        usual, turned = (*outer, rows, -(-2 * columns // _GROUP)), (*outer, -(-2 * rows // _GROUP), columns)
        parts.of_shape("scale", usual, *((turned,) if outer else ()))
        parts.of_dtype("global", "float32")
        ones = tuple(1 for _ in outer)
        each = [(*outer, *(1 for _ in range(rank))) for rank in range(3)] if outer else []
        halves = [(*outer, 2), (*outer, 2, 1)] if outer and parts.name.endswith("gate_up_proj") else []
        parts.of_shape("global", (), (1,), *each, *halves, (*ones, 1, 1))
        weight = NVFP4(packed, scales, parts["global"], divides, scales.shape != usual)
        return Swapped(weight) if weight.turned else weight

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
