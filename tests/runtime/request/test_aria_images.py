"""Aria's image processor: sizes, patches and rows of positions as transformers has them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.aria.processing_aria import AriaProcessor
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from moevlm.runtime.core.errors import BundleError, RefusedOption
from moevlm.runtime.core.towers import Grid, QueryTower
from moevlm.runtime.request.image_limits import ImageLimits
from moevlm.runtime.request.images.query_tables import pack_buckets
from moevlm.runtime.request.images.registry import image_processor
from tests.support.images import noise

VISION = QueryTower(
    patch_size=14, merge_size=1, channels=3, head_dim=72, rope_theta=0.0, queries=256, side=70, position_grid=70
)  # fmt: skip
KIND = {"image_processor_type": "AriaImageProcessor"}
PUBLISHED = {"max_image_size": 980, "min_image_size": 336, "split_image": False}
SIZES = [(640, 480), (1, 1), (17, 400), (2000, 30), (980, 980), (981, 980), (479, 480), (97, 611), (1000, 1600)]


def ours(vision: QueryTower = VISION, **fields: Any) -> Any:
    return image_processor(KIND | fields, vision)


def assert_as_transformers(image: Image.Image, vision: QueryTower = VISION, **fields: Any) -> None:
    said = AriaProcessor.images_kwargs  # what it tells its processor of images, whose own fields come second
    wanted = AriaImageProcessorPil(**fields)(images=[image], return_tensors="np", **said)
    (mask,), (pixels,), side = wanted["pixel_mask"], wanted["pixel_values"], vision.patch_size
    assert wanted["num_crops"] == 1
    mine = ours(vision, **fields)
    inputs, [(height, width)] = mine.pack(mine.fit(mine.open(image)))
    seen = mask.reshape(980 // side, side, 980 // side, side).any(axis=(1, 3))
    assert seen.sum() == height * width
    assert seen[:height, :width].all()
    assert mine.layout(image).grids == [(height, width)]
    assert mine.layout(image).tokens(vision) == vision.queries
    patches = pixels.reshape(3, 980 // side, side, 980 // side, side).transpose(1, 3, 0, 2, 4)
    np.testing.assert_array_equal(inputs.pixel_patches, patches[seen].reshape(height * width, -1))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_cut_as_transformers_does(size: tuple[int, int]) -> None:
    assert_as_transformers(noise(size), **PUBLISHED)


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes_and_shortest_sides_are_those_of_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(3):
        width, height = (int(2**exponent) for exponent in rng.uniform(3, 10, 2))
        patch = int(rng.choice([7, 20, 49]))
        vision = msgspec.structs.replace(VISION, patch_size=patch, side=980 // patch)
        mode = str(rng.choice(["RGB", "L", "P", "RGBA", "1"]))
        assert_as_transformers(noise((width, height), seed, mode), vision, min_image_size=int(rng.integers(1, 981)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_normalize": False},
        {"image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 1.0], "min_image_size": 980},
        {"rescale_factor": 1 / 127},
        {"resample": 2},
        {"max_image_size": 490, "split_image": True, "split_resolutions": [[490, 980]]},
    ],
    ids=str,
)
def test_fields_change_pixels_as_in_transformers(fields: dict[str, Any]) -> None:
    assert_as_transformers(noise((300, 200)), **fields)


def positions(vision: QueryTower, grids: list[Grid]) -> list[np.ndarray]:
    """Rows of the table, image by image, by transformers' own module."""
    side = vision.position_grid
    config = Idefics3VisionConfig(hidden_size=1, image_size=side, patch_size=1, num_channels=1)
    module = Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        module.patch_embedding.weight.zero_()
        module.patch_embedding.bias.zero_()
        module.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
        most = max(max(grid) for grid in grids)
        mask = torch.zeros((len(grids), most, most), dtype=torch.bool)
        for image, (height, width) in enumerate(grids):
            mask[image, :height, :width] = True
        rows = module(torch.zeros(len(grids), 1, most, most), mask).long().reshape(len(grids), most, most)
    return [found[:h, :w].reshape(-1).numpy() for found, (h, w) in zip(rows, grids, strict=True)]


@pytest.mark.parametrize("side", [1, 2, 3, 16, 17, 19, 25, 31, 33, 50, 55, 70, 128])
def test_rows_of_positions_are_those_of_transformers(side: int) -> None:
    """Patches often lie on a border between two rows, where the last bit decides."""
    vision = msgspec.structs.replace(VISION, position_grid=side)
    grids = [(n, 1 + n * 37 % 70) for n in range(1, 71)]
    index = pack_buckets(grids, vision)["position_index"]
    assert (index.dtype, index.shape) == (np.int64, (sum(h * w for h, w in grids), 1))
    np.testing.assert_array_equal(index[:, 0], np.concatenate(positions(vision, grids)))


def test_max_patches_is_that_of_a_square() -> None:
    assert ours(**PUBLISHED).max_patches == 70**2 == ours().grid(ours().fit(noise((5, 5)))[0])[0] ** 2


@pytest.mark.parametrize("limits", [ImageLimits(max_tokens=256), ImageLimits(low_detail=True)], ids=str)
def test_limits_that_every_image_keeps_change_nothing(limits: ImageLimits) -> None:
    image = noise((300, 200))
    assert ours().fit(image, limits)[0].tobytes() == ours().fit(image)[0].tobytes()
    assert ours().layout(image, limits) == ours().layout(image)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (ImageLimits(min_pixels=4096), r"^unsupported value min_pixels = 4096 \(allowed: none, "),
        (ImageLimits(max_pixels=1 << 20), r"^unsupported value max_pixels = 1048576 \(allowed: none, "),
        (ImageLimits(max_tokens=255), r"^unsupported value max_image_tokens = 255 \(allowed: 256, which every image "),
        (ImageLimits(max_tokens=0), r"^unsupported value max_image_tokens = 0 "),
    ],
    ids=str,
)
def test_limits_that_no_image_keeps_are_refused_by_name(limits: ImageLimits, words: str) -> None:
    for act in (ours().fit, ours().layout):
        with pytest.raises(RefusedOption, match=words):
            act(noise((30, 30)), limits)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_image_size": 0}, r"min_image_size = 0 \(supported: a whole number from 1 to 980\)"),
        ({"min_image_size": 981}, "min_image_size = 981 "),
        ({"min_image_size": 336.0}, "min_image_size = "),
        ({"do_resize": False}, "do_resize = "),
        ({"do_center_crop": True}, "do_center_crop = "),
    ],
    ids=str,
)
def test_fields_that_cannot_be_reproduced_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        ours(**fields)


def test_the_references_own_fields_are_taken() -> None:
    image_processor(AriaImageProcessorPil(**PUBLISHED).to_dict(), VISION)
