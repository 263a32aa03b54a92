"""What every image processor does: images opened safely, resized to whole blocks of patches, packed for one call."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import ExifTags, Image

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import BundleError, RequestError, require_positive
from moevlm.runtime.core.towers import Grid, Tower, VisionMetadata
from moevlm.runtime.request.image_file import open_encoded
from moevlm.runtime.request.image_limits import NO_LIMITS, ImageLimits
from moevlm.runtime.request.image_pixels import upright_rgb
from moevlm.runtime.request.image_source import ImageSource, read_source
from moevlm.runtime.request.images.fields import read_fields
from moevlm.runtime.request.images.layout import ImageLayout
from moevlm.runtime.request.images.slices import Slice, frames_of
from moevlm.runtime.request.vision_inputs import VisionInputs, pack

# Bytes that an encoded image may have: no allowed one needs more, but for its metadata.
_BYTES_PER_PIXEL = 8
_FILE_BYTES = 1 << 26
_FIRST_LYING = 5  # of the EXIF orientations; from it on rows are stored as columns


class ImageProcessor(ABC):
    """Opens images and packs them for one vision call; made by `registry.image_processor`.

    TOWER: whose images it prepares. KNOWN: fields of its own. SIZES: fields that say what the manifest says, too: their
    defaults, and what they are called there. EXACT: whether pixels are the reference's to the bit; else it resizes
    with torchvision, and a byte may differ by one.

    Memory for one image: its file twice, and at most 12 bytes for each pixel of it, or of its resized copy where that
    is larger; 20 for WebP and progressive JPEG, whose decoders keep more.
    """

    TOWER: ClassVar[type[Tower]]
    KNOWN: ClassVar[set[str]]
    SIZES: ClassVar[Mapping[str, tuple[int, str]]]
    EXACT: ClassVar[bool] = True
    _values: np.ndarray  # see `values`; subclasses set it

    def __init__(
        self,
        preprocessor: Mapping[str, Any],
        vision: VisionMetadata,
        max_pixels: int = defaults.MAX_IMAGE_PIXELS,
        max_tokens: int | None = None,
    ) -> None:
        """See `registry.image_processor`."""
        self._fields = read_fields(self._spelled(preprocessor), self.KNOWN, self.SIZES, vision)
        if vision.channels != 3:
            raise BundleError(f"unsupported value in manifest.json: vision.channels = {vision.channels} (supported: 3)")
        self._vision = vision
        self._max_pixels = max_pixels
        self._max_tokens = max_tokens
        self._read()

    @staticmethod
    def _spelled(preprocessor: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fields by the names that the reference has for them, which are those of most files."""
        return preprocessor

    def _read(self) -> None:
        """Take what the fields say, which are the reference's. Raises BundleError."""
        self._resample = Image.Resampling(self._fields.get("resample", Image.Resampling.BICUBIC))

    def open(self, image: ImageSource) -> Image.Image:
        """Decode an image and turn it upright (EXIF); transparency is laid on white. The result is plain RGB.

        Of several frames the first counts. Values of more than 8 bits are scaled, see `upright_rgb`.
        Raises RequestError if it is missing, is not an image of the supported formats, is damaged or too large, or
        would take far longer to decode than an image of its size should.
        """
        opened, name, orientation = self._header(image)
        return upright_rgb(opened, orientation or _orientation(opened), name, used_up=opened is not image)

    def repeatable(self, image: ImageSource) -> ImageSource:
        """The image as a source that can be read again: of a stream its bytes. RequestError as `open`."""
        if isinstance(image, os.PathLike) or not hasattr(image, "read"):
            return image
        return read_source(image, self._most_bytes)[0]

    def layout(self, image: ImageSource, limits: ImageLimits = NO_LIMITS) -> ImageLayout:
        """How `fit` cuts an image, by its header alone. RequestError as `open` and `fit`.

        Nothing is decoded but for a PNG that Pillow has opened: how it lies may stand behind its pixels.
        """
        opened, _, orientation = self._header(image)
        lies = (orientation or _orientation(opened)) >= _FIRST_LYING
        height, width = (opened.width, opened.height) if lies else (opened.height, opened.width)
        return self._layout(height, width, limits)

    def fit(self, image: Image.Image, limits: ImageLimits = NO_LIMITS) -> list[Image.Image]:
        """Resize an image from `open` to whole blocks of patches, and cut it: its pieces, as `ImageLayout.grids` lists.

        RequestError if it is too elongated, or cannot be made as small as `limits` say.
        """
        layout = self._layout(image.height, image.width, limits)
        pieces: list[Image.Image] = []
        if layout.rows:
            height, width = self._pixels(layout.tile)
            whole = self._spread(image, (width * layout.columns, height * layout.rows))
            for top in range(0, whole.height, height):
                pieces += [whole.crop((x, top, x + width, top + height)) for x in range(0, whole.width, width)]
        if layout.overview is not None:
            height, width = self._pixels(layout.overview)
            pieces.append(image.resize((width, height), self._resample))
        return pieces

    def grid(self, image: Image.Image | Slice) -> Grid:
        """Rows and columns of patches that a piece from `fit`, or a slice, is cut into."""
        return image.height // self._vision.patch_size, image.width // self._vision.patch_size

    def pack(self, images: Sequence[Image.Image | Slice]) -> tuple[VisionInputs, list[Grid]]:
        """Inputs of one vision call for pieces from `fit` and slices of videos, and the (h, w) grid of each."""
        grids = [self.grid(image) for image in images]
        size, merge = self._vision.patch_size, self._vision.merge_size
        patches = np.empty((sum(h * w for h, w in grids), self._vision.patch_width), np.float32)
        begin = 0
        for image, (h, w) in zip(images, grids, strict=True):
            frames = np.stack([np.asarray(frame) for frame in frames_of(image)])
            blocks = frames.reshape(len(frames), h // merge, merge, size, w // merge, merge, size, 3)
            blocks = blocks.transpose(7, 1, 4, 2, 5, 0, 3, 6).reshape(3, h * w, len(frames), size, size)
            self._write(blocks, patches[begin : begin + h * w])
            begin += h * w
        return pack(patches, grids, self._vision), grids

    @property
    def values(self) -> np.ndarray:
        """What each byte of a pixel becomes, by channel: [3, 256] float32."""
        return self._values

    @property
    @abstractmethod
    def max_patches(self) -> int:
        """The most patches that a piece of an image has, unless a request says otherwise."""

    def _layout(self, height: int, width: int, limits: ImageLimits) -> ImageLayout:
        """How an image of this size is cut. RequestError as `fit`."""
        height, width = self._resized(height, width, limits)
        return ImageLayout((height // self._vision.patch_size, width // self._vision.patch_size))

    @abstractmethod
    def _resized(self, height: int, width: int, limits: ImageLimits) -> tuple[int, int]:
        """The size that an image in one piece is resized to, of whole blocks. RequestError as `fit`."""

    def _spread(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The image over all of its tiles. size: (width, height) of them together."""
        return image.resize(size, self._resample)

    def _write(self, pixels: np.ndarray, patches: np.ndarray) -> None:
        """Write the values of pixels [3, P, frames, size, size] uint8 into patches [P, patch_width] float32.

        frames: 1 of an image, which is copied where a patch has more; the temporal patch size of a slice. Values lie
        colour by colour, frame by frame, row by row, unless a subclass says otherwise.
        """
        size = self._vision.patch_size
        written = patches.reshape(len(patches), 3, -1, size, size)
        for channel in range(3):
            written[:, channel] = self._values[channel][pixels[channel]]

    def _pixels(self, grid: Grid) -> tuple[int, int]:
        """(height, width) of a piece of this grid."""
        return grid[0] * self._vision.patch_size, grid[1] * self._vision.patch_size

    @property
    def _block(self) -> int:
        """Side of what becomes one token, in pixels."""
        return self._vision.patch_size * self._vision.merge_size

    @property
    def _most_bytes(self) -> int:
        """The most bytes of an encoded image."""
        return max(_FILE_BYTES, _BYTES_PER_PIXEL * self._max_pixels)

    def most_tokens(self, limits: ImageLimits) -> int | None:
        """The most visual tokens of an image, where a request or whoever made this says so. Raises RequestError."""
        given = [n for n in (self._max_tokens, limits.max_tokens) if n is not None]
        for most in given:
            require_positive("max_image_tokens", most)
        return min(given, default=None)

    def _header(self, source: ImageSource) -> tuple[Image.Image, str, int | None]:
        """An image of allowed size, no pixel decoded yet, what to call it in messages, and, of a file, how it lies."""
        found, name = read_source(source, self._most_bytes)
        image, orientation = (found, None) if isinstance(found, Image.Image) else open_encoded(found, name)
        if not image.width or not image.height:
            raise RequestError(f"{name} has no pixels")
        if image.width * image.height > self._max_pixels:
            raise RequestError(
                f"{name} is {image.width} x {image.height} pixels; at most {self._max_pixels} pixels are allowed"
            )
        return image, name, orientation


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 where there is none or the metadata is damaged: the pixels are still good."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1
