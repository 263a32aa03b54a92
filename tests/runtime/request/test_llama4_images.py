"""Llama 4's image processor: tiles and pixels as transformers' own code has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevlm.export.parity.oracle_images import oracle_images
from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.core.towers import TileTower
from moevlm.runtime.request.image_limits import ImageLimits
from moevlm.runtime.request.images.layout import ImageLayout
from moevlm.runtime.request.images.registry import image_processor
from tests.support.images import noise
from tests.support.torchvision import in_place_of_torchvision

VISION = TileTower(patch_size=4, merge_size=2, channels=3, head_dim=64, rope_theta=1e4, side=8)
SIDE = 32  # of a tile, in pixels
KIND = {"image_processor_type": "Llama4ImageProcessorFast", "size": {"height": SIDE, "width": SIDE}}
SIZES = [(64, 32), (1, 1), (500, 30), (30, 500), (32, 32), (97, 61), (61, 97), (200, 199), (300, 100), (3, 299)]


@pytest.fixture(scope="module")
def theirs() -> Iterator[type]:
    with in_place_of_torchvision("transformers.models.llama4.image_processing_llama4") as module:
        yield module.Llama4ImageProcessor


def ours(**fields: Any) -> Any:
    return image_processor(KIND | fields, VISION)


def assert_as_transformers(theirs: type, image: Image.Image, **fields: Any) -> ImageLayout:
    reference = oracle_images(VISION)
    wanted = theirs(**{**KIND, **fields})(images=[image], **reference.processing(VISION))
    grids, patches = reference.patches(wanted, VISION)
    mine = ours(**fields)
    layout = mine.layout(image)
    inputs, packed = mine.pack(mine.fit(mine.open(image)))
    assert packed == layout.grids == grids
    assert [max(layout.rows, 1), max(layout.columns, 1)] == wanted["aspect_ratios"][0].tolist()
    difference = np.abs(inputs.pixel_patches - patches)
    # Two libraries resize: some bytes may differ by one.
    assert difference.max() <= np.diff(mine.values).max()
    assert (difference > 0).mean() < 0.2
    return layout


@pytest.mark.parametrize("enlarges", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_cut_as_transformers_does(theirs: type, size: tuple[int, int], enlarges: bool) -> None:
    assert_as_transformers(theirs, noise(size), resize_to_max_canvas=enlarges)


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_and_numbers_of_tiles_are_those_of_transformers(theirs: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(8):
        width, height = (int(2**exponent) for exponent in rng.uniform(1, 9, 2))
        mode = str(rng.choice(["RGB", "L", "P", "1"]))
        most, enlarges = int(rng.integers(1, 18)), bool(rng.integers(2))
        image = noise((width, height), seed, mode)
        assert_as_transformers(theirs, image, max_patches=most, resize_to_max_canvas=enlarges)


@pytest.mark.parametrize(
    "fields", [{"resample": 3}, {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}], ids=str
)
def test_fields_count_as_in_transformers(theirs: type, fields: dict[str, Any]) -> None:
    assert_as_transformers(theirs, noise((90, 60)), **fields)


def test_every_byte_becomes_the_same_number(theirs: type) -> None:
    """Nothing is resized, so that all is equal to the bit."""
    values = np.arange(256, dtype=np.uint8).repeat(12).reshape(32, 32, 3)
    image = Image.fromarray(values)
    for fields in ({}, {"rescale_factor": 1 / 127, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}):
        reference, mine = oracle_images(VISION), ours(**fields)
        wanted = theirs(**{**KIND, **fields})(images=[image], **reference.processing(VISION))
        inputs, _ = mine.pack(mine.fit(image))
        np.testing.assert_array_equal(inputs.pixel_patches, reference.patches(wanted, VISION)[1])


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (ImageLimits(max_tokens=16), 1),
        (ImageLimits(max_tokens=48), 3),
        (ImageLimits(max_pixels=5 * SIDE**2), 6),
        (ImageLimits(low_detail=True, max_tokens=40), 1),
    ],
    ids=str,
)
def test_limits_of_a_request_bound_the_pieces(limits: ImageLimits, most: int) -> None:
    mine = ours()
    layouts = [mine.layout(noise(size), limits) for size in SIZES]
    assert max(len(layout.grids) for layout in layouts) == most
    for size, layout in zip(SIZES, layouts, strict=True):
        assert len(layout.grids) == len(mine.fit(noise(size), limits))


def test_a_limit_that_means_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^unsupported value min_pixels = 9 \(allowed: none, "):
        ours().layout(noise((64, 64)), ImageLimits(min_pixels=9))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": {"height": 64, "width": 64}}, r"size = .*\(supported: height = width = 32, as in manifest.json\)"),
        ({"max_patches": 0}, r"max_patches = 0 \(supported: a whole number from 1 to 256\)"),
        ({"resize_to_max_canvas": 1}, r"resize_to_max_canvas = 1 \(supported: true, false\)"),
        ({"resample": 1}, r"resample = 1 \(supported: 2, 3\)"),
        ({"do_normalize": False}, r"do_normalize = false \(supported: true\)"),
        ({"do_rescale": False}, r"do_rescale = false \(supported: true\)"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_fields_that_cannot_be_reproduced_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        ours(**fields)
