"""The image processors of Qwen2-VL and GLM-4V: an area between two edges, the aspect ratio kept.

Numerically those of Hugging Face transformers 5.24 on their Pillow backend.
"""

from typing import ClassVar

from moevlm.runtime.core.errors import RefusedOption, RequestError
from moevlm.runtime.core.towers import GridTower, ResampledTower, Tower
from moevlm.runtime.request.image_limits import LOW_DETAIL_PIXELS, ImageLimits, require_pixels
from moevlm.runtime.request.images.edges import blocks_within, enlarged, read_edges, require_aspect
from moevlm.runtime.request.images.fields import CLIP_DEVIATION, CLIP_MEAN, grid_sizes, pixel_values
from moevlm.runtime.request.images.processor import ImageProcessor


class Qwen2VLImages(ImageProcessor):
    """Qwen2VLImageProcessor. EDGES: shortest_edge and longest_edge where the fields do not say."""

    TOWER: ClassVar[type[Tower]] = GridTower
    KNOWN: ClassVar = {"size", "min_pixels", "max_pixels"}
    SIZES: ClassVar = grid_sizes(14)
    EDGES: ClassVar = (56 * 56, 28 * 28 * 1280)

    _vision: GridTower | ResampledTower

    def _read(self) -> None:
        super()._read()
        self._copies = self._vision.temporal_patch_size
        self._shortest, self._longest = read_edges(self._fields, self.EDGES)
        self._values = pixel_values(self._fields, True, CLIP_MEAN, CLIP_DEVIATION)

    @property
    def max_patches(self) -> int:
        return self._longest // (self._frames * self._block**2) * self._vision.merge_size**2

    @property
    def _frames(self) -> int:
        """How often the processor counts a pixel in areas."""
        return 1

    def _enlarged(self, height: int, width: int) -> tuple[int, int]:
        """The size that counts as the image's own."""
        return height, width

    def _resized(self, height: int, width: int, limits: ImageLimits) -> tuple[int, int]:
        block, frames, most = self._block, self._frames, self.most_tokens(limits)
        edges = self._limited_edges(limits, frames)
        size = f"image is {width} x {height} pixels"
        height, width = self._enlarged(height, width)
        require_aspect(height, width, size)
        rows, columns = blocks_within(height, width, block, edges, frames, most=most)
        if most is not None and rows * columns > most:
            raise RequestError(f"{size}, which is too elongated for max_image_tokens = {most}")
        return rows * block, columns * block

    def _limited_edges(self, limits: ImageLimits, frames: int) -> tuple[int, int]:
        """The smallest and the largest area that is allowed, counted as the processor does. Raises RefusedOption."""
        shortest, longest = self._shortest, self._longest
        least, largest = frames * self._block**2, max(self._max_pixels, longest // frames)
        for name, value in (("min_pixels", limits.min_pixels), ("max_pixels", limits.max_pixels)):
            if value is not None:
                require_pixels(name, value, self._block**2, "token", largest)
        if limits.max_pixels is not None:
            longest = frames * limits.max_pixels
        if (most := self.most_tokens(limits)) is not None:
            longest = min(longest, most * least)
        if limits.low_detail:
            longest = max(least, min(longest, frames * LOW_DETAIL_PIXELS))
        if limits.min_pixels is None:  # nothing is enlarged only to be too large
            return shortest if shortest <= longest else least, longest
        if frames * limits.min_pixels > longest:
            allowed = f"up to {longest // frames}, the most pixels of an image"
            raise RefusedOption("min_pixels", limits.min_pixels, allowed)
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
        return enlarged(height, width, self._block)
