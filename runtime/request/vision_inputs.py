"""The vision graph's inputs: patches, what a tower wants to know of each, where images begin."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moevlm.runtime.core.towers import (
    Grid,
    GridTower,
    MoonTower,
    PooledTower,
    QueryTower,
    ResampledTower,
    RotaryTower,
    TileTower,
    Tower,
    VisionMetadata,
)
from moevlm.runtime.request.images.axis_tables import pack_axes
from moevlm.runtime.request.images.grid_tables import pack_grids
from moevlm.runtime.request.images.query_tables import pack_buckets
from moevlm.runtime.request.images.rotary_tables import pack_axial, pack_rotary
from moevlm.runtime.request.images.tile_tables import pack_tiles

# What a tower wants beside pixel_patches, from the grids of images: arrays of a row for each patch, by input.
_TABLES: dict[type[Tower], Callable[[Sequence[Grid], Any], Mapping[str, np.ndarray]]] = {
    GridTower: lambda grids, vision: pack_grids(grids, vision)._asdict(),
    MoonTower: lambda grids, vision: pack_grids(grids, vision)._asdict(),
    PooledTower: pack_axes,
    QueryTower: pack_buckets,
    ResampledTower: pack_axial,
    RotaryTower: pack_rotary,
    TileTower: pack_tiles,
}


@dataclass(frozen=True)
class VisionInputs:
    """One packed call for any number of images; P patches block by block, image after image.

    rows: by the names of the graph's inputs, as `VisionMetadata.inputs` says, each [P, ...].
    image_start: [images + 1] int32, where each image's patches begin: first 0, last P.
    """

    rows: Mapping[str, np.ndarray]
    image_start: np.ndarray

    @property
    def patches(self) -> int:
        """P."""
        return len(self.pixel_patches)

    @property
    def pixel_patches(self) -> np.ndarray:
        """[P, patch_width] float32, the values of pixels."""
        return self.rows["pixel_patches"]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All inputs of the graph by name."""
        return {**self.rows, "image_start": self.image_start}

    def part(self, first: int, stop: int) -> "VisionInputs":
        """Images first to stop, alone."""
        starts = self.image_start[first : stop + 1]
        patches = slice(starts[0], starts[-1])
        return VisionInputs({name: array[patches] for name, array in self.rows.items()}, starts - starts[0])


def pack(patches: np.ndarray, grids: Sequence[Grid], vision: VisionMetadata) -> VisionInputs:
    """The inputs of one call.

    patches: [P, patch_width] float32 of all images. grids: (h, w) in patches for each image, whole blocks.
    """
    starts = np.cumsum([0, *(h * w for h, w in grids)], dtype=np.int32)
    return VisionInputs({"pixel_patches": patches, **_TABLES[type(vision)](grids, vision)}, starts)
