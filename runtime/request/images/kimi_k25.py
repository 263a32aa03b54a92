"""The image processor of Kimi-K2.5: images made smaller if they have too many patches, and filled up with black.

Sizes are those of Hugging Face transformers 5.24, which needs torchvision for it; pixels are resized by Pillow, as the
code published with the checkpoints does.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.towers import MoonTower
from moevlm.runtime.request.image_limits import NO_LIMITS, ImageLimits
from moevlm.runtime.request.images.fields import refuse
from moevlm.runtime.request.images.shrinking import ShrinkingImages

_RESAMPLINGS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # that Pillow and torchvision do alike
_MOST_SIDE, _MOST_PATCHES = 1 << 14, 1 << 24
# What the published file, which has all of them in one object, calls the reference's fields.
_PUBLISHED = "media_proc_cfg"
_OF_IMAGES = {"patch_size": "patch_size", "merge_size": "merge_kernel_size", "max_patches": "in_patch_limit"}
_ALIKE = {"image_mean", "image_std"}
_OF_VIDEOS = {
    *("in_patch_limit_each_frame", "in_patch_limit_video", "fixed_output_tokens_each_frame", "sample_fps"),
    *("max_num_frames_each_video", "temporal_merge_kernel_size", "timestamp_mode"),
}
_KNOWN = {*_OF_IMAGES.values(), *_ALIKE, *_OF_VIDEOS, "patch_limit_on_one_side", "fixed_output_tokens", "config_type"}


class KimiK25Images(ShrinkingImages):
    """Kimi_K25ImageProcessor."""

    TOWER = MoonTower
    EXACT = False
    KNOWN: ClassVar = {"size", "max_patches", _PUBLISHED}
    SIZES: ClassVar = {"patch_size": (14, "patch_size"), "merge_size": (2, "merge_size")}
    MEANS = DEVIATIONS = (0.5,) * 3

    _vision: MoonTower

    @staticmethod
    def _spelled(preprocessor: Mapping[str, Any]) -> Mapping[str, Any]:
        return _as_reference(preprocessor)

    def _read(self) -> None:
        super()._read()
        size = self._fields.get("size", {"max_height": 512, "max_width": 512})
        sides = [size.get(name) if isinstance(size, Mapping) else None for name in ("max_height", "max_width")]
        if sides[0] != sides[1] or not _whole(sides[0], _MOST_SIDE):
            refuse("size", size, f"max_height = max_width, from 1 to {_MOST_SIDE} patches")
        self._side, self._budget = int(sides[0] or 0), self._fields.get("max_patches", 16384)
        if not _whole(self._budget, _MOST_PATCHES):
            refuse("max_patches", self._budget, f"a whole number from 1 to {_MOST_PATCHES}")
        if self._resample not in _RESAMPLINGS:
            refuse("resample", int(self._resample), ", ".join(str(int(one)) for one in _RESAMPLINGS))

    @property
    def max_patches(self) -> int:
        """For sides of r and c patches, (r - merge - 1) * (c - merge - 1) is below the budget, whatever the image."""
        merge, most = self._vision.merge_size, 0
        longest = math.ceil(self._side / merge) * merge
        for rows in range(merge, longest + 1, merge):
            inner = max(rows - merge - 1, 0)
            columns = (math.ceil(self._budget / inner) + merge) // merge * merge if inner else longest
            most = max(most, rows * min(columns, longest))
        return most

    def fit(self, image: Image.Image, limits: ImageLimits = NO_LIMITS) -> list[Image.Image]:
        height, width = self._inner(image.height, image.width, self._limited(image.height, image.width, limits))
        rows, columns = self._padded(height, width)
        whole = Image.new("RGB", (columns, rows))
        whole.paste(image.resize((width, height), self._resample))
        return [whole]

    def _resized(self, height: int, width: int, limits: ImageLimits) -> tuple[int, int]:
        return self._padded(*self._inner(height, width, self._limited(height, width, limits)))

    def _inner(self, height: int, width: int, budget: int) -> tuple[int, int]:
        """The size of the image inside of its whole blocks, with about so many patches at most.

        The reference computes in double precision; so does this.
        """
        patch, side = self._vision.patch_size, self._side * self._vision.patch_size
        patches = max(1.0, height // patch) * max(1.0, width // patch)
        scale = min(1.0, math.sqrt(budget / patches), side / height, side / width)
        return min(max(1, int(height * scale)), side), min(max(1, int(width * scale)), side)

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        return math.ceil(height / self._block) * self._block, math.ceil(width / self._block) * self._block

    def _limited(self, height: int, width: int, limits: ImageLimits) -> int:
        """The patches that an image of this size may have, counted as the reference does."""
        if (most := self._most(limits)) is None:
            return self._budget

        def tokens(budget: int) -> int:
            rows, columns = self._padded(*self._inner(height, width, budget))
            return rows * columns // self._block**2

        budget = bisect_right(range(1, self._budget + 1), most, key=tokens)
        if not budget:
            raise RequestError(f"image is {width} x {height} pixels, which is too elongated for {most} visual tokens")
        return budget


def _whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _as_reference(preprocessor: Mapping[str, Any]) -> Mapping[str, Any]:
    """The published fields under the reference's names; those of videos are left out."""
    published = preprocessor.get(_PUBLISHED)
    if published is None:
        return preprocessor
    if not isinstance(published, Mapping) or published.get("fixed_output_tokens") is not None:
        refuse(_PUBLISHED, published, "an object whose fixed_output_tokens are null")
    for name, value in published.items():
        if name not in _KNOWN and value is not None and value is not False:
            refuse(f"{_PUBLISHED}.{name}", value, "absent")
    fields = {ours: published[theirs] for ours, theirs in _OF_IMAGES.items() if theirs in published}
    if (side := published.get("patch_limit_on_one_side")) is not None:
        fields["size"] = {"max_height": side, "max_width": side}
    fields |= {name: published[name] for name in _ALIKE if name in published}
    return {**fields, **preprocessor}
