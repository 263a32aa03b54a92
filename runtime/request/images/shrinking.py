"""Image processors that leave an image as it is or make it smaller, never larger."""

from typing import ClassVar

from moevlm.runtime.request.image_limits import LOW_DETAIL_PIXELS, ImageLimits, require_absent, require_pixels
from moevlm.runtime.request.images.fields import pixel_values
from moevlm.runtime.request.images.processor import ImageProcessor


class ShrinkingImages(ImageProcessor):
    """MEANS, DEVIATIONS: of pixels where the fields do not say."""

    MEANS: ClassVar[tuple[float, ...]]
    DEVIATIONS: ClassVar[tuple[float, ...]]

    def _read(self) -> None:
        super()._read()
        self._values = pixel_values(self._fields, True, self.MEANS, self.DEVIATIONS)

    def _most(self, limits: ImageLimits) -> int | None:
        """The most visual tokens that an image may have, where something says so. Raises RefusedOption."""
        block = self._block**2
        require_absent("min_pixels", limits.min_pixels, "images of this model are never enlarged")
        found = [] if (most := self.most_tokens(limits)) is None else [most]
        if limits.max_pixels is not None:
            largest = self.max_patches * self._vision.patch_size**2
            require_pixels("max_pixels", limits.max_pixels, block, "token", largest)
            found.append(limits.max_pixels // block)
        if limits.low_detail:
            found.append(max(1, LOW_DETAIL_PIXELS // block))
        return min(found, default=None)
