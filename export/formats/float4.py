"""fp4: e2m1 codes, each group's scale maps its largest magnitude to the format's largest number, 6.

Only what a checkpoint holds so is stored so: of float weights, integers of four bits lose less.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from moevlm.export.formats.base import Array, grouped, held

LARGEST = 6.0


@dataclass(frozen=True)
class Float4Format:
    """A `WeightFormat` of e2m1 numbers."""

    group_size: int
    scales: str = "float32"

    name = "fp4"
    bits = 4
    zeros = False

    def encode(self, rows: Array) -> tuple[Array, Array]:
        """As `WeightFormat.encode`."""
        values = grouped(rows, self.group_size)
        scales = held(np.abs(values).max(-1) / LARGEST, self.scales)
        units = np.divide(values, scales[..., None], out=np.zeros_like(values), where=scales[..., None] > 0)
        return units.clip(-LARGEST, LARGEST).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15, scales

    def decode(self, codes: Array, scales: Array, zeros: Array | None = None) -> Array:  # noqa: ARG002 - it has none
        """As `WeightFormat.decode`."""
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * scales.astype(np.float32)[..., None]
        return values.reshape(*scales.shape[:-1], -1)
