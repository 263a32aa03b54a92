"""The image processor of Pixtral: sides rounded up to whole blocks, an image made smaller where a side is too long.

Numerically that of Hugging Face transformers 5.24 on its Pillow backend, called by its PixtralProcessor.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import ClassVar

from moevlm.runtime.core.towers import RotaryTower
from moevlm.runtime.request.image_limits import ImageLimits
from moevlm.runtime.request.images.fields import CLIP_DEVIATION, CLIP_MEAN, refuse
from moevlm.runtime.request.images.shrinking import ShrinkingImages

_MOST_SIDE = 1 << 16  # of an image, in pixels


class PixtralImages(ShrinkingImages):
    """PixtralImageProcessor."""

    TOWER = RotaryTower
    KNOWN: ClassVar = {"size", "patch_size", "spatial_merge_size", "do_pad"}  # pads images beyond their sizes alone
    SIZES: ClassVar = {}
    MEANS, DEVIATIONS = CLIP_MEAN, CLIP_DEVIATION

    _vision: RotaryTower

    def _read(self) -> None:
        super()._read()
        self._check_block()
        self._longest = self._read_longest()

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
    def max_patches(self) -> int:
        return math.ceil(self._longest / self._block) ** 2 * self._vision.merge_size**2

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
