"""The tables of a GridTower and of a MoonTower: learned positions resampled to each image's grid, rotary angles."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moevlm.runtime.core.errors import BundleError
from moevlm.runtime.core.towers import GridTower, MoonTower
from moevlm.runtime.request.images.blocks import axial_rope, block_order

# Keys' cubic kernel (1981, eq. 4) with the free parameter that PyTorch uses.
_KEYS = -0.75


class PatchTables(NamedTuple):
    """P patches block by block, image after image; the fields are inputs of the graph.

    position_index, position_weight: [P, taps] int64, float32; taps row by row (4 bilinear, 16 bicubic).
    rope_cos, rope_sin: [P, head_dim / 2] float32, first the row's frequencies, then the column's.
    """

    position_index: np.ndarray
    position_weight: np.ndarray
    rope_cos: np.ndarray
    rope_sin: np.ndarray


def pack_grids(grids: Sequence[tuple[int, int]], vision: GridTower | MoonTower) -> PatchTables:
    """Tables for one packed vision call.

    grids: (h, w) in patches for each image, both multiples of the merge size; no image gives tables of no rows.
    Raises BundleError for an unknown position resampling.
    """
    rows, columns = block_order(grids, vision.merge_size)

    # Each axis is computed once per image and coordinate, then looked up by patch.
    row_at = np.repeat(_starts([h for h, _ in grids]), [h * w for h, w in grids]) + rows
    column_at = np.repeat(_starts([w for _, w in grids]), [h * w for h, w in grids]) + columns
    row_tap, row_weight = _axis_taps([h for h, _ in grids], vision)
    column_tap, column_weight = _axis_taps([w for _, w in grids], vision)
    index = row_tap[row_at][:, :, None] * vision.position_grid + column_tap[column_at][:, None, :]
    weight = row_weight[row_at][:, :, None] * column_weight[column_at][:, None, :]

    cos, sin = axial_rope(rows, columns, vision)
    return PatchTables(
        position_index=index.reshape(len(rows), row_tap.shape[1] ** 2),
        position_weight=weight.reshape(len(rows), row_tap.shape[1] ** 2),
        rope_cos=cos,
        rope_sin=sin,
    )


def _starts(lengths: Sequence[int]) -> np.ndarray:
    """Exclusive running sum, [len(lengths)] int64."""
    return np.cumsum([0, *lengths], dtype=np.int64)[:-1]


def _axis_taps(sides: Sequence[int], vision: GridTower | MoonTower) -> tuple[np.ndarray, np.ndarray]:
    """Resample one axis of the position table to each of `sides` lengths, one after the other.

    Returns (tap, weight), [sum(sides), 2 or 4], int64 and float32: table rows, clamped to the border, and their share.
    Coordinates are float32 at every step, because rounding decides which side of a table row they fall on.
    """
    grid, one, half = np.float32(vision.position_grid), np.float32(1), np.float32(0.5)
    side = np.repeat(np.asarray(sides, np.float32), np.asarray(sides, np.int64))
    at = np.arange(len(side), dtype=np.float32) - np.repeat(_starts(sides), sides).astype(np.float32)
    if vision.position_resampling == "bilinear":
        # Corners aligned, as in Qwen3-VL: the first patch is on the first table row, the last on the last.
        source = at * (grid - one) / np.maximum(side - one, one)
        offset = np.arange(0, 2)
    elif vision.position_resampling == "bicubic":
        # Half-pixel centres by way of [-1, 1], as torch.nn.functional.grid_sample is called in GLM-4V.
        unit = (at + half) / side * np.float32(2) - one
        source = ((unit + one) * grid - one) * half
        offset = np.arange(-1, 3)
    else:
        raise BundleError(
            f"unsupported value in manifest.json: model.vision.position_resampling = "
            f'"{vision.position_resampling}" (supported: bicubic, bilinear)'
        )
    floor = np.floor(source)
    distance = np.abs((source - floor)[:, None] - offset.astype(np.float32))
    tap = np.clip(floor.astype(np.int64)[:, None] + offset, 0, vision.position_grid - 1)
    return tap, _keys(distance) if len(offset) == 4 else np.maximum(one - distance, np.float32(0))


def _keys(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel at distances from 0 to 2, float32; in between double, for its terms cancel."""
    d, a = distance.astype(np.float64), _KEYS
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, far).astype(np.float32)
