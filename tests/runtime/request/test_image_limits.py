"""Images made smaller or larger on request, as the model's own processor does with its limits replaced."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.request.image_limits import NO_LIMITS, ImageLimits
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.images.registry import image_processor
from tests.runtime.request.test_images import CHINA, CONFIGS, FLOWER, ORACLES, PNG, VISION, crop, processor

BLOCK = {kind: 2 * config["patch_size"] for kind, config in CONFIGS.items()}
IMAGES = [CHINA, crop(FLOWER, 300, 41), crop(FLOWER, 25, 333), crop(CHINA, 9, 9), crop(CHINA, 200, 200)]


def tokens_of(ours: ImageProcessor, image: Image.Image, limits: ImageLimits = NO_LIMITS) -> int:
    return ours.layout(image, limits).tokens(VISION)


def packed(kind: str, image: Image.Image, limits: ImageLimits, **options: Any) -> np.ndarray:
    config = CONFIGS[kind]
    ours = image_processor(config, msgspec.structs.replace(VISION, patch_size=config["patch_size"]), **options)
    (fitted,) = ours.fit(image, limits)
    height, width = ours.grid(fitted)
    assert ours.layout(image, limits).grids == [(height, width)]
    return ours.pack([fitted])[0].pixel_patches


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("least", "most"), [(None, 20_000), (None, 1), (50_000, 200_000), (1, 5_000), (9_000, 9_000)])
def test_pixel_limits_of_a_request_equal_hugging_face_s_with_the_same_limits(
    kind: str, least: int | None, most: int
) -> None:
    block = BLOCK[kind] ** 2
    most = max(most, block)
    least = least and max(least, block)
    frames = 2 if kind.startswith("glm") else 1
    shortest = CONFIGS[kind]["size"]["shortest_edge"] if least is None else frames * least
    if shortest > frames * most:
        shortest = frames * block
    size = {"shortest_edge": shortest, "longest_edge": frames * most}
    config = {name: value for name, value in CONFIGS[kind].items() if not name.endswith(("_type", "_class"))}
    oracle = ORACLES[kind](**config | {"size": size})
    for image in IMAGES:
        wanted = oracle(image, return_tensors="np")["pixel_values"]
        found = packed(kind, image, ImageLimits(least, most))
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("most", [1, 2, 5, 12, 30, 1000])
def test_no_image_takes_more_tokens_than_the_limit(kind: str, most: int) -> None:
    for image in (CHINA, crop(CHINA, 100, 120), crop(CHINA, 9, 9)):
        alone = packed(kind, image, ImageLimits(max_tokens=most))
        assert 1 <= len(alone) // 4 <= most
        pixels = ImageLimits(max_pixels=most * BLOCK[kind] ** 2)
        if pixels.max_pixels < 200_000:
            np.testing.assert_array_equal(alone, packed(kind, image, ImageLimits(max_pixels=pixels.max_pixels)))
        np.testing.assert_array_equal(alone, packed(kind, image, ImageLimits(), max_tokens=most))
        np.testing.assert_array_equal(alone, packed(kind, image, ImageLimits(max_tokens=2000), max_tokens=most))


def test_a_small_image_is_enlarged_no_further_than_the_limit() -> None:
    smallest = {"size": {"shortest_edge": 64 * 32 * 32, "longest_edge": 300 * 300}}
    assert tokens_of(processor(**smallest), crop(CHINA, 100, 90)) == 9 * 8
    assert tokens_of(processor(**smallest), crop(CHINA, 100, 90), ImageLimits(max_tokens=64)) == 8 * 7


def test_a_limit_larger_than_the_image_changes_nothing() -> None:
    image = crop(CHINA, 100, 120)
    np.testing.assert_array_equal(
        packed("qwen", image, ImageLimits(max_tokens=10**9)), packed("qwen", image, ImageLimits())
    )


def test_low_detail_reduces_to_512_by_512_pixels_and_enlarges_nothing() -> None:
    large = {"size": {"shortest_edge": 4096, "longest_edge": 4096 * 4096}}
    for size, tokens in (((4000, 3000), 18 * 13), ((4000, 100), 101 * 2), ((512, 512), 256), ((320, 320), 100)):
        assert tokens_of(processor(**large), Image.new("RGB", size), ImageLimits(low_detail=True)) == tokens
    assert tokens_of(processor(), CHINA, ImageLimits(low_detail=True)) == tokens_of(processor(), CHINA)
    least = ImageLimits(max_pixels=1024, low_detail=True)
    assert tokens_of(processor(**large), CHINA, least) == 1


def test_an_elongated_image_that_cannot_be_made_so_small_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^image is 3200 x 32 pixels, which is too elongated for max_image_tokens"):
        processor().layout(Image.new("RGB", (3200, 32)), ImageLimits(max_tokens=2))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (ImageLimits(max_pixels=1023), r"max_pixels = 1023 \(allowed: 1024, which is one token, to 50000000\)"),
        (ImageLimits(max_pixels=0), "max_pixels = 0 "),
        (ImageLimits(max_pixels=-5), "max_pixels = -5 "),
        (ImageLimits(max_pixels=50_000_001), "max_pixels = 50000001 "),
        (ImageLimits(min_pixels=10**30), f"min_pixels = {10**30} "),
        (ImageLimits(min_pixels=300 * 300 + 1), r"min_pixels = 90001 \(allowed: up to 90000, the most pixels"),
        (ImageLimits(min_pixels=6000, max_pixels=5000), r"min_pixels = 6000 \(allowed: up to 5000"),
        (ImageLimits(min_pixels=6000, max_tokens=2), r"min_pixels = 6000 \(allowed: up to 2048"),
        (ImageLimits(max_tokens=0), r"max_image_tokens = 0 \(allowed: a whole number, 1 or more\)"),
        (ImageLimits(max_tokens=True), "max_image_tokens = true "),
        (ImageLimits(max_pixels=2000.5), r"max_pixels = 2000\.5 "),
        (ImageLimits(min_pixels="9000"), "min_pixels = '9000' "),
    ],
)
def test_limits_out_of_range_are_refused_by_name(limits: ImageLimits, words: str) -> None:
    for act in (processor().layout, lambda image, limits: processor().fit(processor().open(image), limits)):
        with pytest.raises(RequestError, match=rf"^unsupported value {words}"):
            act(PNG, limits)


@pytest.mark.parametrize(("kind", "longest"), [("qwen", 4096 * 4096), ("glm", 2 * 700 * 900), ("qwen", 301 * 33)])
def test_no_image_has_more_patches_than_the_processor_says(kind: str, longest: int) -> None:
    config = CONFIGS[kind] | {"size": {"shortest_edge": 1024, "longest_edge": longest}}
    ours = image_processor(config, msgspec.structs.replace(VISION, patch_size=config["patch_size"]), max_pixels=1 << 30)
    sides = [int(side * (longest**0.5) / 8) for side in (3, 7, 8, 9, 12)]
    found = [4 * tokens_of(ours, Image.new("1", (width, height))) for width in sides for height in sides]
    assert max(found) <= ours.max_patches
    assert max(found) > 0.7 * ours.max_patches
