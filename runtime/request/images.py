"""Images as the vision graph wants them: opened safely, resized, normalised, cut into patches.

Numerically the Qwen2-VL and GLM-4V image processors of Hugging Face transformers 5.23 on their Pillow backend.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from PIL import ExifTags, Image

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import BundleError, RequestError, one_line, quoted, require_positive, shown
from moevlm.runtime.core.manifest import VisionMetadata
from moevlm.runtime.request.image_file import open_encoded
from moevlm.runtime.request.image_limits import LOW_DETAIL_PIXELS, NO_LIMITS, ImageLimits
from moevlm.runtime.request.image_pixels import upright_rgb
from moevlm.runtime.request.image_source import ImageSource, read_source
from moevlm.runtime.request.vision_inputs import VisionInputs, pack_grids

_MAX_ASPECT = 200
_MOST = 1e6  # that means and scales may be, and what deviations may divide by: results are far inside of float32
# Bytes that an encoded image may have: no allowed one needs more, but for its metadata.
_BYTES_PER_PIXEL = 8
_FILE_BYTES = 1 << 26

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Names as in image_processor_type, without the suffix of the implementation; (shortest_edge, longest_edge) defaults.
_KINDS = {"Qwen2VLImageProcessor": (56 * 56, 28 * 28 * 1280), "Glm4vImageProcessor": (112 * 112, 28 * 28 * 15000)}
# In pixels. Every image is enlarged to the first; the second is as large as a float counts exactly.
_MAX_EDGES = {"shortest_edge": 1 << 26, "longest_edge": 1 << 53}
_KNOWN = {
    *("image_processor_type", "size", "resample", "rescale_factor", "image_mean", "image_std"),
    *("patch_size", "merge_size", "temporal_patch_size"),
    *("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"),
}
# Either for other kinds of input, or about the file itself.
_WITHOUT_EFFECT = {
    *("processor_class", "feature_extractor_type", "auto_map", "transformers_version", "default_to_square"),
    *("data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "image_seq_length"),
}


class ImageProcessor:
    """Opens images and packs them for one vision call.

    preprocessor: the bundle's preprocessor.json. max_pixels: the largest image, as its header states it, that is
    decoded. Raises BundleError naming the field that it cannot reproduce or that contradicts the manifest.

    Memory for one image: its file twice, and at most 12 bytes for each pixel of it, or of its resized copy where that
    is larger; 20 for WebP and progressive JPEG, whose decoders keep more.
    """

    def __init__(
        self,
        preprocessor: Mapping[str, Any],
        vision: VisionMetadata,
        max_pixels: int = defaults.MAX_IMAGE_PIXELS,
        max_tokens: int | None = None,
    ) -> None:
        """max_tokens: the most that an image takes; larger ones are made smaller, as `ImageLimits` say."""
        # A null is as good as absent, but not where the reference takes it for false or fails on it.
        fields = {n: v for n, v in preprocessor.items() if v is not None or (n in _KNOWN and n != "size")}
        kind = _kind(fields)
        _check_fields(fields, kind, vision)
        self._vision = vision
        self._max_pixels = max_pixels
        self._max_tokens = max_tokens
        self._glm = kind == "Glm4vImageProcessor"
        self._shortest, self._longest = _edges(fields, kind)
        self._resample = Image.Resampling(fields.get("resample", Image.Resampling.BICUBIC))
        self._values = _pixel_values(fields)

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

    def tokens(self, image: ImageSource, limits: ImageLimits = NO_LIMITS) -> int:
        """How many tokens an image takes, by its header alone: nothing is decoded. RequestError as `open` and `fit`."""
        opened, _, _ = self._header(image)
        height, width = self._resized(opened.height, opened.width, limits)  # upright or not: the area is the same
        return height * width // self._block**2

    def fit(self, image: Image.Image, limits: ImageLimits = NO_LIMITS) -> Image.Image:
        """Resize an image from `open` to whole patches.

        RequestError if it is too elongated, or cannot be made as small as `limits` say.
        """
        height, width = self._resized(image.height, image.width, limits)
        return image.resize((width, height), self._resample)

    def grid(self, image: Image.Image) -> tuple[int, int]:
        """Rows and columns of patches that an image from `fit` is cut into."""
        return image.height // self._vision.patch_size, image.width // self._vision.patch_size

    def pack(self, images: Sequence[Image.Image]) -> tuple[VisionInputs, list[tuple[int, int]]]:
        """Inputs of one vision call for images from `fit`, and the (h, w) grid of each."""
        grids = [self.grid(image) for image in images]
        size, merge, copies = self._vision.patch_size, self._vision.merge_size, self._vision.temporal_patch_size
        patches = np.empty((sum(h * w for h, w in grids), 3, copies, size, size), np.float32)
        begin = 0
        for image, (h, w) in zip(images, grids, strict=True):
            blocks = np.asarray(image).reshape(h // merge, merge, size, w // merge, merge, size, 3)
            blocks = blocks.transpose(6, 0, 3, 1, 4, 2, 5).reshape(3, h * w, 1, size, size)
            for channel in range(3):
                patches[begin : begin + h * w, channel] = self._values[channel][blocks[channel]]
            begin += h * w
        rows = patches.reshape(len(patches), 3 * copies * size * size)
        return VisionInputs(rows, *pack_grids(grids, self._vision)), grids

    @property
    def max_patches(self) -> int:
        """The most patches that an image has, unless a request says otherwise."""
        return self._longest // (self._frames * self._block**2) * self._vision.merge_size**2

    @property
    def _frames(self) -> int:
        """How often the processor counts a pixel in areas: GLM-4V's once per temporal copy."""
        return self._vision.temporal_patch_size if self._glm else 1

    @property
    def _block(self) -> int:
        """Side of what becomes one token, in pixels."""
        return self._vision.patch_size * self._vision.merge_size

    @property
    def _most_bytes(self) -> int:
        """The most bytes of an encoded image."""
        return max(_FILE_BYTES, _BYTES_PER_PIXEL * self._max_pixels)

    def _resized(self, height: int, width: int, limits: ImageLimits) -> tuple[int, int]:
        """The size nearest to (height, width) with sides of whole merge blocks and an area within the edges.

        The reference rounds in double precision, halves to even; so does this. GLM-4V first enlarges an image smaller
        than one block.
        """
        block = self._block
        frames = self._frames
        shortest, longest = self._limited_edges(limits, frames)
        most = self._most_tokens(limits)
        size = f"image is {width} x {height} pixels"
        if self._glm and min(height, width) < block:
            scale = max(block / height, block / width)
            height, width = int(height * scale), int(width * scale)
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
        if (most := self._most_tokens(limits)) is not None:
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

    def _most_tokens(self, limits: ImageLimits) -> int | None:
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


def _kind(fields: Mapping[str, Any]) -> str:
    name = fields.get("image_processor_type")
    kind = str(name).removesuffix("Fast").removesuffix("Pil")
    if kind not in _KINDS:
        _refuse("image_processor_type", name, ", ".join(_KINDS))
    return kind


def _check_fields(fields: Mapping[str, Any], kind: str, vision: VisionMetadata) -> None:
    """Refuse what `pack` does not do. Absent fields have the reference's defaults."""
    edges = {"min_pixels", "max_pixels"} if kind == "Qwen2VLImageProcessor" else set()
    for name, value in fields.items():
        if name not in _KNOWN | _WITHOUT_EFFECT | edges and value is not False:
            _refuse(name, value, "absent")
    for name in ("do_resize", "do_convert_rgb"):
        if fields.get(name, True) is not True:
            _refuse(name, fields[name], "true")
    for name in ("do_rescale", "do_normalize"):
        if not isinstance(fields.get(name, True), bool):
            _refuse(name, fields[name], "true, false")
    if fields.get("resample", 3) not in list(Image.Resampling):
        _refuse("resample", fields["resample"], ", ".join(str(int(one)) for one in sorted(Image.Resampling)))
    for name, default in (("patch_size", 14), ("merge_size", 2), ("temporal_patch_size", 2)):
        if fields.get(name, default) != getattr(vision, name):
            _refuse(name, fields.get(name, default), f"{getattr(vision, name)}, as in manifest.json")
    if vision.channels != 3:
        raise BundleError(f"unsupported value in manifest.json: vision.channels = {vision.channels} (supported: 3)")


def _edges(fields: Mapping[str, Any], kind: str) -> tuple[int, int]:
    """Smallest and largest area, by either spelling; min_pixels and max_pixels win over size."""
    size = fields.get("size", dict(zip(("shortest_edge", "longest_edge"), _KINDS[kind], strict=True)))
    if not isinstance(size, Mapping):
        _refuse("size", size, "an object with shortest_edge and longest_edge")
    edges = []
    for edge, pixels in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        value = fields.get(pixels, size.get(edge))
        most = _MAX_EDGES[edge]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            _refuse(pixels if pixels in fields else f"size.{edge}", value, f"a whole number from 1 to {most}")
        edges.append(value)
    return edges[0], edges[1]


def _pixel_values(fields: Mapping[str, Any]) -> np.ndarray:
    """What each byte becomes: [3, 256] float32. The scale is applied in double precision, the rest in single."""
    value = np.arange(256, dtype=np.float64)
    if fields.get("do_rescale", True):
        value = value * _numbers(fields, "rescale_factor", 1 / 255)[0]
    table = np.repeat(value.astype(np.float32)[None], 3, axis=0)
    if fields.get("do_normalize", True):
        mean, std = _numbers(fields, "image_mean", _CLIP_MEAN), _numbers(fields, "image_std", _CLIP_STD)
        if not (np.abs(std) > 1 / _MOST).all():
            _refuse("image_std", fields["image_std"], f"numbers of more than {1 / _MOST:g}")
        table = (table - mean.astype(np.float32)[:, None]) / std.astype(np.float32)[:, None]
    return table


def _numbers(fields: Mapping[str, Any], name: str, default: float | tuple[float, ...]) -> np.ndarray:
    """A number, or one per channel, as [3] float64."""
    value = fields.get(name, default)
    try:
        numbers = np.broadcast_to(np.asarray(value, np.float64), 3)
    except (TypeError, ValueError):
        numbers = np.full(3, np.nan)
    if not (np.abs(numbers) < _MOST).all():  # null makes NaN, which is not less either
        _refuse(name, value, f"a number or three, below {_MOST:g}")
    return numbers


def _refuse(field: str, value: Any, supported: str) -> NoReturn:
    raise BundleError(
        f"unsupported value in preprocessor.json: {one_line(field, 60)} = {quoted(value)} (supported: {supported})"
    )
