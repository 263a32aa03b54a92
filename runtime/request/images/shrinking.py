"""Image processors that leave an image as it is or make it smaller, never larger."""

from typing import ClassVar

from moevlm.runtime.core.errors import RequestError, shown
from moevlm.runtime.request.image_limits import LOW_DETAIL_PIXELS, ImageLimits
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
        """The most visual tokens that an image may have, where something says so. Raises RequestError."""
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
