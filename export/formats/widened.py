"""Four-bit numbers of a checkpoint in formats of eight bits that have all of them: int8 and e4m3.

Twice an e2m1 number is an integer, 0, 1, 2, 3, 4, 6, 8 or 12; so (code - 128) * (scale / 2) is the same weight. e4m3
has every e2m1 number itself. Nothing is rounded but the scales, where a format's dtype has too few digits for them.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from moevlm.export.graph.codes import Coded, CodeForm, Codes
from moevlm.runtime.core.dtypes import E4M3

_NUMBERS = CodeForm("fp4", 0).numbers[:16]
# By the wider format: the code of each of the 16, and the factor on scales.
_WIDER = {
    "int8": ((2 * _NUMBERS).astype(np.int16).astype(np.uint8) ^ np.uint8(128), np.float32(0.5)),
    "fp8": (_NUMBERS.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), np.float32(1)),
}


@dataclass(frozen=True)
class Widened(Coded):
    """fp4 as codes of the format `wider`."""

    part: Coded
    wider: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    @property
    def form(self) -> CodeForm:
        form = self.part.form
        return replace(form, kind=self.wider, scales="float32" if form.scales == E4M3 else form.scales)

    def codes(self, start: int, stop: int) -> Codes:
        found, (codes, factor) = self.part.codes(start, stop), _WIDER[self.wider]
        return Codes(codes[found.codes & 15], found.scales * factor)


def widened(own: Coded, kind: str) -> Coded:
    """The same weight in codes of `kind`, where that has all its numbers; else as it is."""
    return Widened(own, kind) if own.form.kind == "fp4" and kind in _WIDER else own
