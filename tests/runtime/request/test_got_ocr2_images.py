"""InternVL's image processor: tiles, their order and pixels as transformers' Pillow backend has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from moevlm.export.parity.oracle_images import oracle_images
from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.core.towers import TileTower
from moevlm.runtime.request.image_limits import NO_LIMITS, ImageLimits
from moevlm.runtime.request.images.layout import ImageLayout
from moevlm.runtime.request.images.registry import image_processor
from tests.support.images import noise

VISION = TileTower(patch_size=4, merge_size=2, channels=3, head_dim=64, rope_theta=0.0, side=8)
SIDE = 32  # of a tile, in pixels
KIND = {"image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": SIDE, "width": SIDE}}
SIZES = [(64, 32), (1, 1), (500, 30), (30, 500), (32, 32), (97, 61), (61, 97), (200, 199), (300, 100), (3, 299)]


def ours(**fields: Any) -> Any:
    return image_processor(KIND | fields, VISION)


def assert_as_transformers(image: Image.Image, **fields: Any) -> ImageLayout:
    theirs = GotOcr2ImageProcessorPil(**{**KIND, **fields})
    reference = oracle_images(VISION)
    wanted = theirs(images=[image], **reference.processing(VISION))
    grids, patches = reference.patches(wanted, VISION)
    mine = ours(**fields)
    layout = mine.layout(image)
    inputs, packed = mine.pack(mine.fit(mine.open(image)))
    assert packed == layout.grids == grids
    assert (
        len(grids)
        == wanted["num_patches"][0]
        == theirs.get_number_of_image_patches(image.height, image.width, {"crop_to_patches": True})
    )
    np.testing.assert_array_equal(inputs.pixel_patches, patches)
    return layout


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_cut_as_transformers_does(size: tuple[int, int]) -> None:
    assert_as_transformers(noise(size))


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_and_numbers_of_tiles_are_those_of_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(8):
        width, height = (int(2**exponent) for exponent in rng.uniform(1, 9, 2))
        least, most = (int(n) for n in rng.integers(1, (4, 14)))
        mode = str(rng.choice(["RGB", "L", "P", "RGBA", "1"]))
        assert_as_transformers(noise((width, height), seed, mode), min_patches=least, max_patches=most)


@pytest.mark.parametrize(
    "fields",
    [
        {"do_normalize": False},
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        {"resample": 2},
        {"crop_to_patches": False, "max_patches": 4},
        {"max_patches": 1},
        {"min_patches": 5, "max_patches": 4},
    ],
    ids=str,
)
def test_fields_count_as_in_transformers(fields: dict[str, Any]) -> None:
    assert_as_transformers(noise((90, 60)), **fields)


def test_ties_go_to_more_tiles_while_the_image_is_large() -> None:
    """Two by two tiles have the shape of one; from half their area on the image gets them."""
    small, large = (assert_as_transformers(noise((side, side)), max_patches=4) for side in (45, 46))
    assert (small.rows, large.rows, large.columns) == (0, 2, 2)


def test_tiles_come_row_by_row_and_the_overview_last() -> None:
    quarters = np.zeros((64, 64, 3), np.uint8)
    for i, place in enumerate(np.ndindex(2, 2)):
        quarters[32 * place[0] :, 32 * place[1] :] = 60 * (i + 1)
    mine = ours(max_patches=4, min_patches=4)
    pieces = mine.fit(Image.fromarray(quarters))
    assert [int(np.asarray(piece).mean().round()) for piece in pieces] == [60, 120, 180, 240, 150]


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (ImageLimits(max_tokens=16), 1),
        (ImageLimits(max_tokens=47), 1),
        (ImageLimits(max_tokens=48), 3),
        (ImageLimits(max_tokens=100), 6),
        (ImageLimits(max_pixels=SIDE**2), 1),
        (ImageLimits(max_pixels=5 * SIDE**2), 6),
        (ImageLimits(max_pixels=20 * SIDE**2), 21),
        (ImageLimits(low_detail=True), 13),
        (ImageLimits(low_detail=True, max_tokens=40), 1),
    ],
    ids=str,
)
def test_limits_of_a_request_bound_the_pieces(limits: ImageLimits, most: int) -> None:
    mine = ours()
    layouts = [mine.layout(noise(size), limits) for size in SIZES]
    assert max(len(layout.grids) for layout in layouts) == most
    for size, layout in zip(SIZES, layouts, strict=True):
        assert layout.tokens(VISION) == 16 * len(layout.grids) == 16 * len(mine.fit(noise(size), limits))


def test_detail_low_is_one_piece_of_a_published_size() -> None:
    tower = TileTower(patch_size=14, merge_size=2, channels=3, head_dim=64, rope_theta=0.0, side=32)
    mine = image_processor(KIND | {"size": {"height": 448, "width": 448}}, tower)
    assert len(mine.layout(noise((2000, 1000)), ImageLimits(low_detail=True)).grids) == 1
    assert len(mine.layout(noise((2000, 1000)), NO_LIMITS).grids) == 9


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (ImageLimits(min_pixels=4096), r"^unsupported value min_pixels = 4096 \(allowed: none, .*32 x 32 pixels\)$"),
        (ImageLimits(max_pixels=1023), r"^unsupported value max_pixels = 1023 \(allowed: 1024, which is one tile, to "),
        (ImageLimits(max_tokens=15), r"^unsupported value max_image_tokens = 15 \(allowed: 16, which is one tile, or"),
    ],
    ids=["enlarged", "pixels", "tokens"],
)
def test_limits_that_mean_nothing_are_refused(limits: ImageLimits, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ours().layout(noise((64, 64)), limits)


def test_tiles_that_are_too_large_together_are_refused() -> None:
    tower = TileTower(patch_size=64, merge_size=2, channels=3, head_dim=64, rope_theta=0.0, side=64)
    size = {"size": {"height": 4096, "width": 4096}}
    assert image_processor(KIND | size | {"max_patches": 4}, tower).max_patches == 4096
    with pytest.raises(BundleError, match=r"max_patches = 5 \(supported: tiles of up to 67108864 pixels together\)"):
        image_processor(KIND | size | {"max_patches": 5}, tower)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": {"height": 64, "width": 64}}, r"size = .*\(supported: height = width = 32, as in manifest.json\)"),
        ({"size": {"shortest_edge": 32}}, "size = "),
        ({"max_patches": 0}, r"max_patches = 0 \(supported: a whole number from 1 to 256\)"),
        ({"max_patches": 1000}, "max_patches = 1000"),
        ({"min_patches": True}, "min_patches = true"),
        ({"do_pad": True}, r"do_pad = true \(supported: absent\)"),
        ({"do_resize": False}, "do_resize = false"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_fields_that_cannot_be_reproduced_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        ours(**fields)
