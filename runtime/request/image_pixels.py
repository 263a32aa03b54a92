"""Pixels as the model's processor takes them: RGB, upright, opaque, 8 bits a channel."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from moevlm.runtime.core.errors import RequestError

_STRIP_PIXELS = 1 << 18
# What puts the stored rows and columns upright, by EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(image: Image.Image, orientation: int, name: str, *, used_up: bool) -> Image.Image:
    """Decode an image; transparency is laid on white. The result is the caller's own.

    Channels of more than 8 bits, which Pillow would clip, are scaled: 16-bit ones by their type, 32-bit integers and
    floats by the range of 16 bits, of 1, or of their own values, the first that holds all of them; what lies from 0
    to 255 stays as it is. used_up: the image is not needed any more, and its memory is freed early.
    Raises RequestError, naming the image, if it is damaged or has values that are not finite.
    """
    try:
        image.load()
        if not _is_finite(image):
            raise RequestError(f"{name} has values that are not finite")
        # Strip by strip: at no time is there more than one other whole image.
        plain = image.mode == "RGB" and not _has_alpha(image)
        rgb = image if used_up and plain else _converted(image)
        if used_up and rgb is not image:
            image.close()
        turn = _UPRIGHT.get(orientation)
        if turn is not None:
            rgb = rgb.transpose(turn)
    except RequestError:
        raise
    except Exception as error:  # Decoders of untrusted bytes: Pillow does not say what they may raise.
        raise RequestError(f"{name} is damaged or incomplete") from error
    rgb.info.clear()  # Upright and opaque now: nothing may turn or blend it again.
    return rgb


def _converted(image: Image.Image) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    levels = _levels(image)
    for box in _strips(image.width, image.height):
        strip = image.crop(box)
        if levels is not None:
            strip = _scaled(strip, *levels)
        elif strip.mode in ("RGBa", "La"):
            strip = strip.convert(strip.mode.upper())
        if _has_alpha(strip):
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        rgb.paste(strip.convert("RGB"), box)
    return rgb


def _strips(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _has_alpha(image: Image.Image) -> bool:
    return ("A" in image.getbands() and image.mode != "LAB") or image.info.get("transparency") is not None


def _is_finite(image: Image.Image) -> bool:
    strips = _strips(image.width, image.height) if image.mode == "F" else ()
    return all(np.isfinite(np.asarray(image.crop(box))).all() for box in strips)


def _levels(image: Image.Image) -> tuple[float, float] | None:
    """The values that become 0 and 255; None if all fit into 8 bits."""
    if image.mode.startswith("I;16"):
        return 0, 65535
    if image.mode not in ("I", "F"):
        return None
    low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
    if image.mode == "F" and 0 <= low <= high <= 1:
        return 0, 1
    if 0 <= low <= high <= 255 or low == high:
        return None
    return (0, 65535) if 0 <= low <= high <= 65535 else (low, high)


def _scaled(strip: Image.Image, low: float, high: float) -> Image.Image:
    """Grey of 8 bits. low < high. A value that the file calls transparent becomes white."""
    values = np.asarray(strip)
    levels = np.rint((values.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)
    clear = strip.info.get("transparency")
    return Image.fromarray(levels if clear is None else np.where(values == clear, np.uint8(255), levels))
