"""fp8: e4m3 codes, each group's scale maps its largest magnitude to the format's largest number.

The two codes that are not numbers are never written; what they are read as depends on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moevlm.export.formats.base import Array, grouped, held, in_units

LARGEST = 448.0


def _values() -> Array:
    code = np.arange(127)
    exponent, fraction = code >> 3, code & 7
    return np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))


VALUES = _values()  # of the codes 0 to 126, rising; +128 for the sign


@dataclass(frozen=True)
class Float8Format:
    """A `WeightFormat` of e4m3 numbers."""

    group_size: int
    scales: str = "float32"

    name = "fp8"
    bits = 8

    def encode(self, rows: Array) -> tuple[Array, Array]:
        """As `WeightFormat.encode`."""
        values = grouped(rows, self.group_size)
        scales = held(np.abs(values).max(-1) / LARGEST, self.scales)
        return nearest(in_units(values, scales)), scales

    def decode(self, codes: Array, scales: Array, zeros: Array | None = None) -> Array:  # noqa: ARG002 - it has none
        """As `WeightFormat.decode`."""
        values = numbers(codes)
        values *= scales.astype(np.float32)[..., None]
        return values.reshape(*scales.shape[:-1], -1)


def numbers(codes: Array) -> Array:
    """The number of each e4m3 code: float32."""
    magnitude = np.append(VALUES, 480.0)[codes & 127]
    return np.where(codes >= 128, -magnitude, magnitude).astype(np.float32)


def nearest(values: Array) -> Array:
    """To the nearest e4m3, ties to the even code, beyond the largest to the largest: uint8."""
    magnitude = np.minimum(np.abs(values), LARGEST)
    above = np.searchsorted(VALUES, magnitude).clip(1)
    middle = (VALUES[above - 1] + VALUES[above]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    return (code + np.where(np.signbit(values), 128, 0)).astype(np.uint8)
