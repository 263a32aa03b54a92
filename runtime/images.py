"""Images as the vision graph wants them: opened safely, resized, normalised, cut into patches.

Numerically the Qwen2-VL and GLM-4V image processors of Hugging Face transformers 5.23 on their Pillow backend.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from moevlm.runtime import defaults
from moevlm.runtime.engine import VisionInputs
from moevlm.runtime.errors import BundleError, RequestError
from moevlm.runtime.manifest import VisionFacts
from moevlm.runtime.vision_inputs import pack_grids

ImageSource = Image.Image | bytes | os.PathLike[str]

_FORMATS = "PNG, JPEG, WebP, BMP or GIF"
_MAX_ASPECT = 200

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

# Orientation in EXIF 2.32, section 4.6.4: what puts the stored rows and columns upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageProcessor:
    """Opens images and packs them for one vision call.

    preprocessor: the bundle's preprocessor.json. max_pixels: the largest image, as its header states it, that is
    decoded. Raises BundleError naming the field that it cannot reproduce or that contradicts the manifest.
    """

    def __init__(
        self, preprocessor: Mapping[str, Any], vision: VisionFacts, max_pixels: int = defaults.MAX_IMAGE_PIXELS
    ) -> None:
        # A null is as good as absent, but not where the reference takes it for false or fails on it.
        fields = {n: v for n, v in preprocessor.items() if v is not None or (n in _KNOWN and n != "size")}
        kind = _kind(fields)
        _check_fields(fields, kind, vision)
        self._vision = vision
        self._max_pixels = max_pixels
        self._glm = kind == "Glm4vImageProcessor"
        self._shortest, self._longest = _edges(fields, kind)
        self._resample = Image.Resampling(fields.get("resample", Image.Resampling.BICUBIC))
        self._values = _pixel_values(fields)

    def open(self, image: ImageSource) -> Image.Image:
        """Decode an image and turn it upright (EXIF); transparency is laid on white. The result is plain RGB.

        image: encoded bytes, a pathlib.Path, or a Pillow image. Of several frames the first counts.
        Raises RequestError if it is missing, is not an image of the supported formats, is damaged or too large.
        """
        with self._header(image) as (opened, name):
            return _decode(opened, name)

    def tokens(self, image: ImageSource) -> int:
        """How many tokens an image takes, by its header alone: nothing is decoded. RequestError as `open` and `fit`."""
        with self._header(image) as (opened, _):
            height, width = self._resized(opened.height, opened.width)  # upright or not: the area is the same
        return height * width // (self._vision.patch_size * self._vision.merge_size) ** 2

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize an image from `open` to whole patches. RequestError if it is too elongated."""
        height, width = self._resized(image.height, image.width)
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

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """The size nearest to (height, width) with sides of whole merge blocks and an area within the edges.

        The reference rounds in double precision, halves to even; so does this. GLM-4V first enlarges an image smaller
        than one block, and counts the area once per temporal copy.
        """
        block = self._vision.patch_size * self._vision.merge_size
        frames = self._vision.temporal_patch_size if self._glm else 1
        if self._glm and min(height, width) < block:
            scale = max(block / height, block / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) / min(height, width) > _MAX_ASPECT:
            raise RequestError(
                f"image is {width} x {height} pixels: one side is more than {_MAX_ASPECT} times the other"
            )
        rows, columns = round(height / block), round(width / block)
        area = frames * rows * columns * block * block
        if area > self._longest:
            shrink = math.sqrt(frames * height * width / self._longest)
            rows, columns = (max(1, math.floor(side / shrink / block)) for side in (height, width))
        elif area < self._shortest:
            grow = math.sqrt(self._shortest / (frames * height * width))
            rows, columns = (math.ceil(side * grow / block) for side in (height, width))
        return rows * block, columns * block

    @contextmanager
    def _header(self, image: ImageSource) -> Iterator[tuple[Image.Image, str]]:
        """An image of allowed size, no pixel decoded yet, and what to call it in messages."""
        if isinstance(image, Image.Image):
            yield self._checked(image, "image"), "image"
        elif isinstance(image, bytes):
            yield self._checked(_read_header(io.BytesIO(image), "image"), "image"), "image"
        elif isinstance(image, os.PathLike):
            path = Path(os.fsdecode(image))
            name = f"image {str(path)!r}"
            with _open_file(path, name) as file:
                yield self._checked(_read_header(file, name), name), name
        elif isinstance(image, str):
            # Text may come from a client of the program that calls this: it must not name the program's files.
            raise RequestError(
                f"an image is the text {image!r:.60} (allowed: a pathlib.Path, encoded bytes, or a Pillow image; "
                "URLs are not fetched)"
            )
        else:
            raise RequestError(f"an image is {image!r:.60} (allowed: a pathlib.Path, encoded bytes, or a Pillow image)")

    def _checked(self, image: Image.Image, name: str) -> Image.Image:
        if not image.width or not image.height:
            raise RequestError(f"{name} has no pixels")
        if image.width * image.height > self._max_pixels:
            raise RequestError(
                f"{name} is {image.width} x {image.height} pixels; at most {self._max_pixels} pixels are allowed"
            )
        return image


def _open_file(path: Path, name: str) -> IO[bytes]:
    # Only regular files: opening a pipe would block.
    if not path.is_file():
        raise RequestError(f"{name} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        return path.open("rb")
    except OSError as error:
        raise RequestError(f"{name} cannot be read") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        image = _to_rgb(image if turn is None else image.transpose(turn))
    except Exception as error:  # Decoders of untrusted bytes: Pillow does not say what they may raise.
        raise RequestError(f"{name} is damaged or incomplete") from error
    image.info.clear()  # Upright and opaque now: nothing may turn or blend it again.
    return image


def _read_header(file: IO[bytes], name: str) -> ImageFile:
    """Pick the decoder by the file's first bytes and let it read the header.

    Not Image.open: it warns about or refuses large images by a process-wide limit, before ours can be applied.
    """
    start = file.read(16)
    file.seek(0)
    try:
        if start.startswith(b"\x89PNG\r\n\x1a\n"):
            return PngImageFile(file)
        if start.startswith(b"\xff\xd8\xff"):
            return jpeg_factory(file)
        if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
            return WebPImageFile(file)
        if start.startswith((b"GIF87a", b"GIF89a")):
            return GifImageFile(file)
        if start.startswith(b"BM"):
            return BmpImageFile(file)
    except Exception as error:  # As above.
        raise RequestError(f"{name} is damaged or incomplete") from error
    raise RequestError(f"{name} is not a {_FORMATS} image")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 where there is none or the metadata is damaged: the pixels are still good."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """A copy in RGB; any transparency shows white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _kind(fields: Mapping[str, Any]) -> str:
    name = fields.get("image_processor_type")
    kind = str(name).removesuffix("Fast").removesuffix("Pil")
    if kind not in _KINDS:
        _refuse("image_processor_type", name, ", ".join(_KINDS))
    return kind


def _check_fields(fields: Mapping[str, Any], kind: str, vision: VisionFacts) -> None:
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
        if not std.all():
            _refuse("image_std", fields["image_std"], "numbers other than 0")
        table = (table - mean.astype(np.float32)[:, None]) / std.astype(np.float32)[:, None]
    return table


def _numbers(fields: Mapping[str, Any], name: str, default: float | tuple[float, ...]) -> np.ndarray:
    """A number, or one per channel, as [3] float64."""
    value = fields.get(name, default)
    try:
        numbers = np.broadcast_to(np.asarray(value, np.float64), 3)
    except (TypeError, ValueError):
        numbers = np.full(3, np.nan)
    if not np.isfinite(numbers).all():  # null makes NaN
        _refuse(name, value, "a number or three")
    return numbers


def _refuse(field: str, value: Any, supported: str) -> NoReturn:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise BundleError(f"unsupported value in preprocessor.json: {field[:60]} = {shown} (supported: {supported})")
