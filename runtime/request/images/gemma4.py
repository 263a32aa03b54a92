"""The image processor of Gemma 4: as many visual tokens as the budget allows, the aspect ratio kept.

Numerically that of Hugging Face transformers 5.24 on its Pillow backend.
"""

import math
from typing import ClassVar

import numpy as np

from moevlm.runtime.core.towers import PooledTower
from moevlm.runtime.request.image_limits import LOW_DETAIL_PIXELS, ImageLimits, require_absent, require_pixels
from moevlm.runtime.request.images.fields import pixel_values, refuse
from moevlm.runtime.request.images.processor import ImageProcessor

_BUDGETS = (70, 140, 280, 560, 1120)  # that the reference takes


class Gemma4Images(ImageProcessor):
    """Gemma4ImageProcessor. A patch's values lie row by row, its colours side by side."""

    TOWER = PooledTower
    KNOWN: ClassVar = {"size", "max_soft_tokens"}
    SIZES: ClassVar = {"patch_size": (16, "patch_size"), "pooling_kernel_size": (3, "merge_size")}

    _vision: PooledTower

    def _read(self) -> None:
        super()._read()
        self._budget = self._fields.get("max_soft_tokens", 280)
        if not isinstance(self._budget, int) or self._budget not in _BUDGETS:
            refuse("max_soft_tokens", self._budget, ", ".join(map(str, _BUDGETS)))
        self._longest = self._vision.position_table // self._vision.merge_size  # side of an image, in visual tokens
        if self._budget > self._longest:
            refuse("max_soft_tokens", self._budget, f"up to {self._longest}, for the sides of images")
        # From -1 to 1: the reference's tower does that to values from 0 to 1, its processor does not.
        self._values = 2 * pixel_values(self._fields, False, (0.0,) * 3, (1.0,) * 3) - 1

    @property
    def max_patches(self) -> int:
        return self._budget * self._vision.merge_size**2

    def _resized(self, height: int, width: int, limits: ImageLimits) -> tuple[int, int]:
        """The largest size of about the same shape with sides of whole blocks and no more than the budget's tokens.

        The reference computes in double precision; so does this.
        """
        block, budget = self._block, self._limited(limits)
        factor = math.sqrt(budget * block**2 / (height * width))
        rows, columns = (math.floor(factor * side / block) for side in (height, width))
        if not rows:
            rows, columns = 1, min(width // height, budget)
        elif not columns:
            rows, columns = min(height // width, budget), 1
        return max(rows, 1) * block, max(columns, 1) * block

    def _limited(self, limits: ImageLimits) -> int:
        """The most visual tokens that an image may have. Raises RefusedOption."""
        budget, block = self._budget, self._block**2
        why = "images of this model get as many pixels as max_pixels allows"
        require_absent("min_pixels", limits.min_pixels, why)
        if limits.max_pixels is not None:
            require_pixels("max_pixels", limits.max_pixels, block, "token", self._longest * block)
            budget = limits.max_pixels // block
        if (most_tokens := self.most_tokens(limits)) is not None:
            budget = min(budget, most_tokens)
        return max(1, min(budget, LOW_DETAIL_PIXELS // block)) if limits.low_detail else budget

    def _write(self, pixels: np.ndarray, patches: np.ndarray) -> None:
        size = self._vision.patch_size
        written = patches.reshape(-1, size, size, 3)
        for channel in range(3):
            written[..., channel] = self._values[channel][pixels[channel, :, 0]]
