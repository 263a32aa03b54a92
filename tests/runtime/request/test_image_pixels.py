"""Images of every mode become RGB without losing what they show."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from moevlm.runtime.core.errors import RequestError
from tests.runtime.request.test_images import CHINA, SMALL, assert_same_as_hugging_face, crop, encode, processor

RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)


def levels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(processor().open(image))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("kind", ["file", "I;16", "I;16B", "I"])
def test_16_bit_grey_keeps_all_its_levels(kind: str) -> None:
    image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    if kind == "file":
        image = Image.open(io.BytesIO(encode(image, "PNG")))
    elif kind != "I;16":
        image = image.convert("I").convert(kind)
    np.testing.assert_array_equal(levels(image), RAMP)


def test_a_dark_16_bit_picture_stays_dark() -> None:
    np.testing.assert_array_equal(levels(Image.fromarray(RAMP.astype(np.uint16))), np.rint(RAMP / 257))


def test_16_bit_grey_with_a_transparent_value_shows_white_there() -> None:
    content = encode(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG", transparency=7 * 257)
    pixels = np.asarray(processor().open(content))[..., 0]
    np.testing.assert_array_equal(pixels, np.where(RAMP == 7, 255, RAMP))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.int32), RAMP),
        (RAMP.astype(np.int32) * 257, RAMP),
        (RAMP.astype(np.int32) * 1_000_000, RAMP),
        (RAMP.astype(np.int32) * 1000 - 90_000, RAMP),
        (RAMP.astype(np.float32), RAMP),
        (RAMP.astype(np.float32) / 255, RAMP),
        (RAMP.astype(np.float32) * 257, RAMP),
        (RAMP.astype(np.float32) * 2 - 255, RAMP),
        (RAMP.astype(np.float32) * 1e30, RAMP),
        (np.full((8, 32), -5, np.int32), None),
        (np.full((8, 32), 1e9, np.float32), None),
    ],
)
def test_integers_and_floats_are_scaled_by_their_range(values: np.ndarray, expected: np.ndarray | None) -> None:
    found = levels(Image.fromarray(values))
    if expected is None:
        assert len(np.unique(found)) == 1
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    values = RAMP.astype(np.float32)
    values[3, 4] = bad
    with pytest.raises(RequestError, match=r"^image has values that are not finite$"):
        processor().open(Image.fromarray(values))


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "YCbCr", "HSV", "CMYK", "LAB"])
def test_every_mode_equals_hugging_face(mode: str) -> None:
    photo = crop(CHINA, 120, 80)
    image = Image.merge("LAB", photo.split()) if mode == "LAB" else photo.convert("P" if mode == "PA" else mode)
    if mode == "PA":
        image = image.convert("PA")
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(photo.size))
    assert_same_as_hugging_face("qwen", [image], [image.convert("RGB")] if mode == "LAB" else None)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha_is_laid_on_white(mode: str) -> None:
    plain = Image.new("RGBA" if mode == "RGBa" else "LA", (9, 9), (200, 200, 200, 128)[-4 if mode == "RGBa" else -2 :])
    np.testing.assert_allclose(processor().open(plain.convert(mode)), processor().open(plain), atol=2)


def test_an_image_of_the_caller_stays_as_it_is() -> None:
    for mode in ("RGB", "RGBA", "P", "I;16"):
        image = SMALL.convert("L").convert("I").convert(mode) if mode == "I;16" else SMALL.convert(mode)
        image.info["note"] = 1
        before = image.tobytes()
        ours = processor().open(image)
        ours.putpixel((0, 0), (1, 2, 3))
        assert image.tobytes() == before
        assert image.info == {"note": 1}


def test_strips_join_without_a_seam() -> None:
    image = CHINA.resize((1500, 700)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    white = Image.new("RGBA", image.size, "white")
    np.testing.assert_array_equal(processor().open(image), Image.alpha_composite(white, image).convert("RGB"))
    grey = Image.fromarray(np.arange(1500 * 700, dtype=np.int32).reshape(700, 1500))
    np.testing.assert_array_equal(levels(grey), np.rint(np.asarray(grey) * (255 / (1500 * 700 - 1))))
