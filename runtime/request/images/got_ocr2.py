"""The image processor of InternVL: as many tiles as have about the image's shape, which is stretched over them.

Numerically GotOcr2ImageProcessor of Hugging Face transformers 5.24 on its Pillow backend, called by InternVLProcessor.
"""

from typing import ClassVar

from moevlm.runtime.core.towers import TileTower
from moevlm.runtime.request.images.fields import CLIP_DEVIATION, CLIP_MEAN, pixel_values
from moevlm.runtime.request.images.tiles import TileImages


class GotOcr2Images(TileImages):
    """GotOcr2ImageProcessor. crop_to_patches counts for nothing: InternVLProcessor always cuts."""

    KNOWN: ClassVar = {"size", "crop_to_patches", "min_patches", "max_patches"}
    SIDE, TILES = 384, 12

    _vision: TileTower

    def _read(self) -> None:
        super()._read()
        self._least = self._count("min_patches", 1)
        if self._least > self._tiles:  # the reference leaves every image in one piece
            self._tiles = 1
        self._values = pixel_values(self._fields, True, CLIP_MEAN, CLIP_DEVIATION)

    def _cut(self, height: int, width: int, most: int) -> tuple[int, int]:
        """The tiles whose shape is nearest to the image's; of two the later, while the image is half as large as they.

        The reference computes in double precision; so does this.
        """
        sides = range(1, most + 1)
        shapes = [(c, r) for c in sides for r in sides if min(self._least, most) <= c * r <= most]
        found, nearest = (1, 1), float("inf")
        for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
            difference = abs(width / height - columns / rows)
            large = width * height > 0.5 * self._side**2 * columns * rows
            if difference < nearest or (difference == nearest and large):
                found, nearest = (columns, rows), difference
        return found[1], found[0]
