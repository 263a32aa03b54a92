"""The image processor of Pixtral: sides rounded up to whole blocks, an image made smaller where a side is too long.

Numerically that of Hugging Face transformers 5.24 on its Pillow backend, called by its PixtralProcessor.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import RequestError, shown
from moevlm.runtime.core.towers import RotaryTower
from moevlm.runtime.request.image_limits import LOW_DETAIL_PIXELS, ImageLimits
from moevlm.runtime.request.images.fields import CLIP_DEVIATION, CLIP_MEAN, pixel_values, refuse
from moevlm.runtime.request.images.processor import ImageProcessor

_MOST_SIDE = 1 << 16  # of an image, in pixels


class PixtralImages(ImageProcessor):
    """PixtralImageProcessor. A patch's values lie colour by colour, row by row."""

    TOWER = RotaryTower
    KNOWN: ClassVar = {
        "size",
        "patch_size",
        "spatial_merge_size",
        "do_pad",
    }  # images are padded beyond their sizes only
    SIZES: ClassVar = {}

    def __init__(
        self,
        preprocessor: Mapping[str, Any],
        vision: RotaryTower,
        max_pixels: int = defaults.MAX_IMAGE_PIXELS,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(preprocessor, vision, max_pixels, max_tokens)
        self._check_block()
        self._longest = self._read_longest()
        self._values = pixel_values(self._fields, True, CLIP_MEAN, CLIP_DEVIATION)

    def _check_block(self) -> None:
        """The reference's processor takes the block's side for that of a patch, whatever the field says."""
        patch, merge = self._vision.patch_size, self._vision.merge_size
        given = self._fields.get("patch_size", patch)
        sides = [given.get("height"), given.get("width")] if isinstance(given, Mapping) else [given]
        if any(isinstance(side, bool) or side not in (patch, self._block) for side in sides):
            refuse("patch_size", given, f"{patch} or {self._block}, as in manifest.json")
        if (given := self._fields.get("spatial_merge_size", merge)) != merge:
            refuse("spatial_merge_size", given, f"{merge}, as in manifest.json")

    def _read_longest(self) -> int:
        """The longest side that an image may have, in pixels."""
        size = self._fields.get("size", {"longest_edge": 1024})
        sides = [size]
        if isinstance(size, Mapping):
            named = ("longest_edge",) if "longest_edge" in size else ("height", "width")
            sides = [size.get(name) for name in named]
        for side in sides:
            if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= _MOST_SIDE or side != sides[0]:
                refuse("size", size, f"longest_edge, or height = width, from 1 to {_MOST_SIDE}")
        return int(sides[0])

    @property
    def values(self) -> np.ndarray:
        return self._values

    @property
    def max_patches(self) -> int:
        return math.ceil(self._longest / self._block) ** 2 * self._vision.patches_per_token

    def _resized(self, height: int, width: int, limits: ImageLimits) -> tuple[int, int]:
        longest, most = self._longest, self._most(limits)
        if most is not None:  # the longest side with which the image has no more tokens
            longest = bisect_right(
                range(1, longest + 1), most, key=lambda side: math.prod(self._blocks(height, width, side))
            )
        rows, columns = self._blocks(height, width, longest)
        return rows * self._block, columns * self._block

    def _blocks(self, height: int, width: int, longest: int) -> tuple[int, int]:
        """Rows and columns of an image whose sides are `longest` at most; each is one block at least.

        The reference computes in double precision; so does this. It fails on an image that has no height or no width.
        """
        ratio = max(height / longest, width / longest)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        return max(1, math.ceil(height / self._block)), max(1, math.ceil(width / self._block))

    def _most(self, limits: ImageLimits) -> int | None:
        """The most visual tokens that an image may have, where something says so."""
        block = self._block**2
        if limits.min_pixels is not None:
            raise RequestError(
                f"unsupported value min_pixels = {shown(limits.min_pixels)} (allowed: none, for images of this model "
                "are never enlarged)"
            )
        found = [] if (most := self.most_tokens(limits)) is None else [most]
        if limits.max_pixels is not None:
            largest = self.max_patches * self._vision.patch_size**2
            whole = isinstance(limits.max_pixels, int) and not isinstance(limits.max_pixels, bool)
            if not whole or not block <= limits.max_pixels <= largest:
                raise RequestError(
                    f"unsupported value max_pixels = {shown(limits.max_pixels)} (allowed: {block}, which is one token, "
                    f"to {largest})"
                )
            found.append(limits.max_pixels // block)
        if limits.low_detail:
            found.append(max(1, LOW_DETAIL_PIXELS // block))
        return min(found, default=None)

    def _write(self, pixels: np.ndarray, patches: np.ndarray) -> None:
        size = self._vision.patch_size
        written = patches.reshape(-1, 3, size, size)
        for channel in range(3):
            written[:, channel] = self._values[channel][pixels[channel, :, 0]]
