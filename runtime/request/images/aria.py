"""The image processor of Aria: the longer side always of one length, the shorter one filled up to whole patches.

Numerically AriaImageProcessor of Hugging Face transformers 5.24 on its Pillow backend, called by AriaProcessor. The
patches behind an image, which make its pixels a square there, are masked for every layer; here there are none.
"""

from typing import ClassVar

from PIL import Image

from moevlm.runtime.core.errors import RefusedOption
from moevlm.runtime.core.towers import QueryTower
from moevlm.runtime.request.image_limits import NO_LIMITS, ImageLimits, require_absent
from moevlm.runtime.request.images.fields import pixel_values, refuse
from moevlm.runtime.request.images.processor import ImageProcessor

_SHORTEST = 336  # pixels of the shorter side at least, where the fields do not say


class AriaImages(ImageProcessor):
    """AriaImageProcessor.

    max_image_size and what says how images are split count for nothing: AriaProcessor asks for 980 pixels in one piece,
    and the manifest says how many patches that are.
    """

    TOWER = QueryTower
    KNOWN: ClassVar = {"max_image_size", "min_image_size", "split_image", "split_resolutions"}
    SIZES: ClassVar = {}

    _vision: QueryTower

    def _read(self) -> None:
        super()._read()
        self._longest = self._vision.side * self._vision.patch_size
        shortest = self._fields.get("min_image_size", _SHORTEST)
        if isinstance(shortest, bool) or not isinstance(shortest, int) or not 1 <= shortest <= self._longest:
            refuse("min_image_size", shortest, f"a whole number from 1 to {self._longest}")
        self._shortest = shortest
        self._values = pixel_values(self._fields, True, (0.5,) * 3, (0.5,) * 3)

    @property
    def max_patches(self) -> int:
        return self._vision.side**2

    def fit(self, image: Image.Image, limits: ImageLimits = NO_LIMITS) -> list[Image.Image]:
        height, width = self._resized(image.height, image.width, limits)
        whole = Image.new("RGB", (width, height))
        rows, columns = self._inner(image.height, image.width)
        whole.paste(image.resize((columns, rows), self._resample))
        return [whole]

    def _resized(self, height: int, width: int, limits: ImageLimits) -> tuple[int, int]:
        self._check(limits)
        rows, columns = (-(-side // self._block) for side in self._inner(height, width))
        return rows * self._block, columns * self._block

    def _inner(self, height: int, width: int) -> tuple[int, int]:
        """The size of the image itself. The reference computes in double precision; so does this."""
        scale = self._longest / max(height, width)
        shorter = max(int(min(height, width) * scale), self._shortest)
        return (shorter, self._longest) if width >= height else (self._longest, shorter)

    def _check(self, limits: ImageLimits) -> None:
        """Raises RefusedOption for limits that no image keeps: all have a side and a number of tokens in common."""
        why = f"the longer side of an image always gets {self._longest} pixels"
        require_absent("min_pixels", limits.min_pixels, why)
        require_absent("max_pixels", limits.max_pixels, why)
        most, each = self.most_tokens(limits), self._vision.queries
        if most is not None and most < each:
            raise RefusedOption("max_image_tokens", most, f"{each}, which every image of this model has, or more")
