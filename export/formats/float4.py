"""fp4: e2m1 codes, each group's scale maps its largest magnitude to the format's largest number, 6.

For what a checkpoint holds so: of float weights, integers of four bits lose less. With scales in E4M3 each is a number
of e4m3 times a float32 of its row, which maps the row's largest to 448: NVFP4 with such a float32 of each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moevlm.export.formats import float8
from moevlm.export.formats.base import Array, grouped, held, in_units
from moevlm.runtime.core.dtypes import E4M3

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of the codes 0 to 7; +8 for the sign
_NUMBERS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_MIDDLES = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2
LARGEST = 6.0


@dataclass(frozen=True)
class Float4Format:
    """A `WeightFormat` of e2m1 numbers. scales: E4M3 for two levels, see `graph.codes.Levels`."""

    group_size: int
    scales: str = "float32"

    name = "fp4"
    bits = 4
    zeros = False

    def encode(self, rows: Array) -> tuple[Array, Array]:
        """As `WeightFormat.encode`."""
        values = grouped(rows, self.group_size)
        scales = held(np.abs(values).max(-1) / LARGEST, self.scales)
        if self.scales == E4M3:
            of_groups, of_rows = self.levels(rows)
            scales = float8.numbers(of_groups) * of_rows[:, None]
        return _codes(in_units(values, scales)), scales

    def levels(self, rows: Array) -> tuple[Array, Array]:
        """The scales that rows [n, K] get in two levels: codes of e4m3 [n, groups], and float32 [n]."""
        scales = np.abs(grouped(rows, self.group_size)).max(-1) / np.float32(LARGEST)
        of_rows = scales.max(-1) / np.float32(float8.LARGEST)
        return float8.nearest(in_units(scales, of_rows)), of_rows

    def decode(self, codes: Array, scales: Array, zeros: Array | None = None) -> Array:  # noqa: ARG002 - it has none
        """As `WeightFormat.decode`."""
        values = _NUMBERS[codes] * scales.astype(np.float32)[..., None]
        return values.reshape(*scales.shape[:-1], -1)


def _codes(values: Array) -> Array:
    """To the nearest e2m1, ties to the even code, beyond the largest to the largest: uint8."""
    magnitude = np.abs(values)
    code = np.searchsorted(_MIDDLES, magnitude)
    code += (code % 2 == 1) & (magnitude == np.append(_MIDDLES, np.inf)[code])
    return (code + np.where(np.signbit(values), 8, 0)).astype(np.uint8)
