"""Pixtral's image processor: sizes and patches as transformers' Pillow backend has them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)

from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.core.towers import RotaryTower
from moevlm.runtime.request.image_limits import ImageLimits
from moevlm.runtime.request.images.blocks import block_order
from moevlm.runtime.request.images.registry import image_processor
from tests.support.images import noise

VISION = RotaryTower(patch_size=14, merge_size=2, channels=3, head_dim=64, rope_theta=1e4)
KIND = {"image_processor_type": "PixtralImageProcessor"}
PUBLISHED = {"patch_size": {"height": 14, "width": 14}, "size": {"longest_edge": 1540}}
SIZES = [(640, 480), (1, 1), (17, 400), (2000, 30), (28, 28), (29, 27), (1540, 1541), (97, 611), (1600, 1200)]


def ours(vision: RotaryTower = VISION, **fields: Any) -> Any:
    return image_processor(KIND | fields, vision)


def assert_as_transformers(image: Image.Image, vision: RotaryTower = VISION, **fields: Any) -> None:
    side = vision.patch_size
    given = fields | {"patch_size": side * vision.merge_size}  # as PixtralProcessor calls it
    wanted = PixtralImageProcessorPil(**given)(images=[image], return_tensors="np")
    mine = ours(vision, **fields)
    inputs, [(height, width)] = mine.pack(mine.fit(mine.open(image)))
    assert (height * side, width * side) == tuple(wanted["image_sizes"][0])
    assert mine.layout(image).tokens(vision) == vision.tokens((height, width))
    rows, columns = block_order([(height, width)], vision.merge_size)
    patches = wanted["pixel_values"][0].reshape(3, height, side, width, side).transpose(1, 3, 0, 2, 4)
    np.testing.assert_array_equal(inputs.pixel_patches, patches[rows, columns].reshape(len(rows), -1))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_cut_as_transformers_does(size: tuple[int, int]) -> None:
    assert_as_transformers(noise(size), **PUBLISHED)


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_and_longest_sides_are_those_of_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(4):
        width, height = (int(2**exponent) for exponent in rng.uniform(3, 10, 2))
        vision = msgspec.structs.replace(
            VISION, patch_size=int(rng.choice([4, 7, 16])), merge_size=int(rng.choice([1, 2, 3]))
        )
        mode = str(rng.choice(["RGB", "L", "P", "RGBA", "1"]))
        fields = {"size": {"longest_edge": int(rng.integers(200, 1000))}, "patch_size": vision.patch_size}
        assert_as_transformers(noise((width, height), seed, mode), vision, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_normalize": False},
        {"image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 1.0], "size": {"height": 200, "width": 200}},
        {"rescale_factor": 1 / 127, "size": 140},
        {"resample": 2, "do_pad": False},
    ],
    ids=str,
)
def test_fields_change_pixels_as_in_transformers(fields: dict[str, Any]) -> None:
    assert_as_transformers(noise((300, 200)), msgspec.structs.replace(VISION, patch_size=16, merge_size=1), **fields)


def test_a_side_that_the_reference_makes_none_is_one_block() -> None:
    image = noise((4000, 1))
    with pytest.raises(ValueError, match=r"SizeDict\(height=0, "):
        PixtralImageProcessorPil(**PUBLISHED | {"patch_size": 28})(images=[image])
    mine = ours(**PUBLISHED)
    assert mine.grid(mine.fit(image)[0]) == (2, 110)


def test_max_patches_is_that_of_a_square_as_long_as_allowed() -> None:
    assert ours(**PUBLISHED).max_patches == 110**2
    assert ours(size={"longest_edge": 30}).max_patches == 16


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (ImageLimits(max_tokens=5), 5),
        (ImageLimits(max_pixels=28 * 28 * 7), 7),
        (ImageLimits(max_pixels=28 * 28 * 500), 500),
        (ImageLimits(low_detail=True), 512 * 512 // 28**2),
        (ImageLimits(max_tokens=1), 1),
        (ImageLimits(max_tokens=9, low_detail=True, max_pixels=28 * 28 * 100), 9),
    ],
    ids=str,
)
def test_an_image_is_as_large_as_the_limits_of_a_request_allow(limits: ImageLimits, most: int) -> None:
    mine = ours(**PUBLISHED)
    for size in SIZES:
        image = noise(size)
        rows, columns = (side // 2 for side in mine.grid(mine.fit(image, limits)[0]))
        assert mine.layout(image, limits).grids == [(2 * rows, 2 * columns)]
        assert 1 <= rows * columns <= most
        # As the reference with some longest side, and the next one that changes anything has too many tokens.
        blank = np.broadcast_to(0, (3, image.height, image.width))
        found = [get_resize_output_image_size(blank, edge, 28, ChannelDimension.FIRST) for edge in range(1, 1541)]
        blocks = [(max(1, height // 28), max(1, width // 28)) for height, width in found]
        assert (rows, columns) == next(pair for pair in reversed(blocks) if pair[0] * pair[1] <= most)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (ImageLimits(min_pixels=4096), r"^unsupported value min_pixels = 4096 \(allowed: none, "),
        (ImageLimits(max_pixels=783), r"^unsupported value max_pixels = 783 \(allowed: 784, which is one token, to "),
        (ImageLimits(max_pixels=1 << 40), r"^unsupported value max_pixels = 1099511627776 \(allowed: "),
        (ImageLimits(max_tokens=0), r"^unsupported value max_image_tokens = 0 "),
    ],
    ids=str,
)
def test_limits_that_cannot_be_are_refused_by_name(limits: ImageLimits, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ours().fit(noise((30, 30)), limits)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": {"longest_edge": 0}}, r"size = .*\(supported: longest_edge, or height = width, from 1 to "),
        ({"size": {"longest_edge": 1540.0}}, "size = "),
        ({"size": {"shortest_edge": 5}}, "size = "),
        ({"size": {"height": 20, "width": 40}}, "size = "),
        ({"size": True}, "size = "),
        ({"patch_size": 16}, r"patch_size = 16 \(supported: 14 or 28, as in manifest\.json\)"),
        ({"patch_size": {"height": 14}}, "patch_size = "),
        ({"patch_size": {"height": 14, "width": 16}}, "patch_size = "),
        ({"spatial_merge_size": 1}, r"spatial_merge_size = 1 \(supported: 2, as in manifest\.json\)"),
        ({"do_resize": False}, r"do_resize = "),
        ({"do_center_crop": True}, r"do_center_crop = "),
    ],
    ids=str,
)
def test_fields_that_cannot_be_reproduced_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        ours(**fields)


def test_the_references_own_fields_are_taken() -> None:
    image_processor(PixtralImageProcessorPil(**PUBLISHED).to_dict(), VISION)


def test_fields_as_published_are_taken() -> None:
    """mistralai/Mistral-Small-3.1-24B-Instruct-2503, preprocessor_config.json."""
    assert_as_transformers(
        noise((310, 190)),
        do_convert_rgb=True,
        do_normalize=True,
        do_rescale=True,
        do_resize=True,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        patch_size={"height": 14, "width": 14},
        processor_class="PixtralProcessor",
        resample=3,
        rescale_factor=1 / 255,
        size={"longest_edge": 1540},
    )
