"""The image processor of Llama 4: tiles in which the image keeps its shape, the rest of them black.

Source: Llama4ImageProcessor of Hugging Face transformers 5.24. It resizes with torchvision, this with Pillow: a byte
of a resized image may differ by one.
"""

import math
from typing import ClassVar

import numpy as np
from PIL import Image

from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.towers import TileTower
from moevlm.runtime.request.image_limits import NO_LIMITS, ImageLimits
from moevlm.runtime.request.images.fields import pixel_values, refuse
from moevlm.runtime.request.images.tiles import TileImages

_RESAMPLINGS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # that Pillow and torchvision do alike


class Llama4Images(TileImages):
    """Llama4ImageProcessor."""

    KNOWN: ClassVar = {"size", "max_patches", "resize_to_max_canvas"}
    SIDE, TILES = 336, 16
    EXACT = False

    _vision: TileTower

    def _read(self) -> None:
        super()._read()
        self._resample = Image.Resampling(self._fields.get("resample", Image.Resampling.BILINEAR))
        if self._resample not in _RESAMPLINGS:
            refuse("resample", int(self._resample), ", ".join(str(int(one)) for one in _RESAMPLINGS))
        self._enlarges = self._fields.get("resize_to_max_canvas", False)
        if not isinstance(self._enlarges, bool):
            refuse("resize_to_max_canvas", self._enlarges, "true, false")
        for name in ("do_rescale", "do_normalize"):
            if not self._fields.get(name, True):
                refuse(name, False, "true")
        # The reference rounds to bfloat16 at every step.
        self._values = pixel_values(self._fields, True, (0.5,) * 3, (0.5,) * 3, dtype=DTYPES["bfloat16"].numpy)

    def fit(self, image: Image.Image, limits: ImageLimits = NO_LIMITS) -> list[Image.Image]:
        if self._layout(image.height, image.width, limits).rows:
            return super().fit(image, limits)
        return [self._spread(image, (self._side, self._side))]  # in one piece it keeps its shape, too

    def _cut(self, height: int, width: int, most: int) -> tuple[int, int]:
        """The smallest canvas on which the image is as large as it may be.

        That is the least that enlarges it, with resize_to_max_canvas the most, or the least that makes it smaller. The
        reference computes in single precision; so does this.
        """
        rows, columns = np.indices((most, most)).reshape(2, -1) + 1
        allowed = rows * columns <= most
        rows, columns = rows[allowed], columns[allowed]
        scales = np.minimum(
            np.float32(rows * self._side) / np.float32(height), np.float32(columns * self._side) / np.float32(width)
        )
        larger = scales[scales >= 1]
        chosen = scales.max() if self._enlarges or not len(larger) else larger.min()
        area = np.where(scales == chosen, rows * columns, most + 1)
        return int(rows[area.argmin()]), int(columns[area.argmin()])

    def _spread(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """At the top left, the shape kept; enlarged up to one tile alone, but for resize_to_max_canvas."""
        width, height = size
        if not self._enlarges:
            width, height = (min(max(own, self._side), most) for own, most in zip(image.size, size, strict=True))
        across, down = width / image.width, height / image.height
        if across < down:
            height = min(math.floor(image.height * across), height)
        else:
            width = min(math.floor(image.width * down), width)
        canvas = Image.new("RGB", size)
        canvas.paste(image.resize((max(width, 1), max(height, 1)), self._resample))
        return canvas
