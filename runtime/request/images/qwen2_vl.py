"""The image processors of Qwen2-VL and GLM-4V: an area between two edges, the aspect ratio kept.

Numerically those of Hugging Face transformers 5.24 on their Pillow backend.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import RequestError, shown
from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.request.image_limits import LOW_DETAIL_PIXELS, ImageLimits
from moevlm.runtime.request.images.fields import CLIP_DEVIATION, CLIP_MEAN, grid_sizes, pixel_values, refuse
from moevlm.runtime.request.images.processor import ImageProcessor

_MAX_ASPECT = 200
# In pixels. Every image is enlarged to the first; the second is as large as a float counts exactly.
_MAX_EDGES = {"shortest_edge": 1 << 26, "longest_edge": 1 << 53}


class Qwen2VLImages(ImageProcessor):
    """Qwen2VLImageProcessor. EDGES: shortest_edge and longest_edge where the fields do not say."""

    TOWER = GridTower
    KNOWN: ClassVar = {"size", "min_pixels", "max_pixels"}
    SIZES: ClassVar = grid_sizes(14)
    EDGES: ClassVar = (56 * 56, 28 * 28 * 1280)

    def __init__(
        self,
        preprocessor: Mapping[str, Any],
        vision: GridTower,
        max_pixels: int = defaults.MAX_IMAGE_PIXELS,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(preprocessor, vision, max_pixels, max_tokens)
        self._copies = vision.temporal_patch_size
        self._shortest, self._longest = _edges(self._fields, self.EDGES)
        self._values = pixel_values(self._fields, True, CLIP_MEAN, CLIP_DEVIATION)

    @property
    def values(self) -> np.ndarray:
        return self._values

    @property
    def max_patches(self) -> int:
        return self._longest // (self._frames * self._block**2) * self._vision.patches_per_token

    @property
    def _frames(self) -> int:
        """How often the processor counts a pixel in areas."""
        return 1

    def _enlarged(self, height: int, width: int) -> tuple[int, int]:
        """The size that counts as the image's own."""
        return height, width

    def _write(self, pixels: np.ndarray, patches: np.ndarray) -> None:
        size = self._vision.patch_size
        written = patches.reshape(-1, 3, self._copies, size, size)
        for channel in range(3):
            written[:, channel] = self._values[channel][pixels[channel]]  # an image is copied

    def _resized(self, height: int, width: int, limits: ImageLimits) -> tuple[int, int]:
        """The size nearest to (height, width) with sides of whole merge blocks and an area within the edges.

        The reference rounds in double precision, halves to even; so does this.
        """
        block = self._block
        frames = self._frames
        shortest, longest = self._limited_edges(limits, frames)
        most = self.most_tokens(limits)
        size = f"image is {width} x {height} pixels"
        height, width = self._enlarged(height, width)
        if max(height, width) / min(height, width) > _MAX_ASPECT:
            raise RequestError(f"{size}: one side is more than {_MAX_ASPECT} times the other")
        rows, columns = round(height / block), round(width / block)
        area = frames * rows * columns * block * block
        if area > longest:
            shrink = math.sqrt(frames * height * width / longest)
            rows, columns = (max(1, math.floor(side / shrink / block)) for side in (height, width))
        elif area < shortest:
            grow = math.sqrt(shortest / (frames * height * width))
            rows, columns = (math.ceil(side * grow / block) for side in (height, width))
            if most is not None and rows * columns > most:
                rows, columns = (max(1, math.floor(side * grow / block)) for side in (height, width))
        if most is not None and rows * columns > most:
            raise RequestError(f"{size}, which is too elongated for max_image_tokens = {most}")
        return rows * block, columns * block

    def _limited_edges(self, limits: ImageLimits, frames: int) -> tuple[int, int]:
        """The smallest and the largest area that is allowed, counted as the processor does."""
        shortest, longest = self._shortest, self._longest
        least, largest = frames * self._block**2, frames * self._max_pixels
        for name, value in (("min_pixels", limits.min_pixels), ("max_pixels", limits.max_pixels)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and least <= frames * value <= max(largest, longest)):
                raise RequestError(
                    f"unsupported value {name} = {shown(value)} (allowed: {self._block**2}, which is one token, to "
                    f"{max(largest, longest) // frames})"
                )
        if limits.max_pixels is not None:
            longest = frames * limits.max_pixels
        if (most := self.most_tokens(limits)) is not None:
            longest = min(longest, most * least)
        if limits.low_detail:
            longest = max(least, min(longest, frames * LOW_DETAIL_PIXELS))
        if limits.min_pixels is None:  # nothing is enlarged only to be too large
            return shortest if shortest <= longest else least, longest
        if frames * limits.min_pixels > longest:
            raise RequestError(
                f"unsupported value min_pixels = {limits.min_pixels} (allowed: up to {longest // frames}, the most "
                "pixels of an image)"
            )
        return frames * limits.min_pixels, longest


class Glm4vImages(Qwen2VLImages):
    """Glm4vImageProcessor: its areas count a pixel once per temporal copy."""

    KNOWN: ClassVar = {"size"}
    EDGES: ClassVar = (112 * 112, 28 * 28 * 15000)

    @property
    def _frames(self) -> int:
        return self._copies

    def _enlarged(self, height: int, width: int) -> tuple[int, int]:
        """An image with a side shorter than a block is enlarged first."""
        block = self._block
        if min(height, width) >= block:
            return height, width
        scale = max(block / height, block / width)
        return int(height * scale), int(width * scale)


def _edges(fields: Mapping[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    """Smallest and largest area, by either spelling; min_pixels and max_pixels win over size."""
    size = fields.get("size", dict(zip(("shortest_edge", "longest_edge"), default, strict=True)))
    if not isinstance(size, Mapping):
        refuse("size", size, "an object with shortest_edge and longest_edge")
    edges = []
    for edge, pixels in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        value = fields.get(pixels, size.get(edge))
        most = _MAX_EDGES[edge]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            refuse(pixels if pixels in fields else f"size.{edge}", value, f"a whole number from 1 to {most}")
        edges.append(value)
    return edges[0], edges[1]
