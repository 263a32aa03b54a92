"""ERNIE 4.5 VL's image processor: sizes and patches as transformers' Pillow backend has them, and its positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Ernie4_5_VLMoeConfig
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeTextRotaryEmbedding,
    Ernie4_5_VLMoeVisionRotaryEmbedding,
)

from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.core.manifest import RopeMetadata
from moevlm.runtime.core.towers import ResampledTower
from moevlm.runtime.request.image_limits import ImageLimits
from moevlm.runtime.request.images.registry import image_processor
from moevlm.runtime.request.positions import rope_tables
from moevlm.runtime.request.vision_inputs import pack

VISION = ResampledTower(patch_size=14, merge_size=2, channels=3, head_dim=80, rope_theta=1e4)
KIND = {"image_processor_type": "Ernie4_5_VLMoeImageProcessorFast"}
SIZES = [(640, 480), (1, 1), (17, 400), (2000, 30), (28, 28), (29, 27), (1540, 1541), (97, 611), (3000, 2200)]


def ours(vision: ResampledTower = VISION, **fields: Any) -> Any:
    return image_processor(KIND | fields, vision)


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size).integers(0, 256, (*size[::-1], 3), np.uint8))


def assert_as_transformers(image: Image.Image, vision: ResampledTower = VISION, **fields: Any) -> None:
    wanted = Ernie4_5_VLMoeImageProcessorPil(**fields)(images=[image], return_tensors="np")
    mine = ours(vision, **fields)
    inputs, [grid] = mine.pack(mine.fit(mine.open(image)))
    assert (1, *grid) == tuple(wanted["image_grid_thw"][0])
    assert mine.layout(image).tokens(vision) == vision.tokens(grid)
    np.testing.assert_array_equal(inputs.pixel_patches, wanted["pixel_values"])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_cut_as_transformers_does(size: tuple[int, int]) -> None:
    assert_as_transformers(noise(size))


def test_other_fields_are_those_of_transformers() -> None:
    vision = ResampledTower(patch_size=8, merge_size=3, channels=3, head_dim=16, rope_theta=1e4)
    size = {"shortest_edge": 24**2, "longest_edge": 50 * 24**2}
    fields = {"patch_size": 8, "merge_size": 3, "temporal_patch_size": 1, "size": size, "image_mean": [0.5, 0.4, 0.3]}
    for image in (noise((100, 300)), noise((900, 500))):
        assert_as_transformers(image, vision, **fields)


def test_a_processor_that_copies_frames_is_refused() -> None:
    with pytest.raises(BundleError, match=r"temporal_patch_size = 2 \(supported: 1, as in manifest.json\)"):
        ours(temporal_patch_size=2)


def test_limits_hold() -> None:
    mine = ours()
    assert mine.layout(noise((640, 480)), ImageLimits(max_pixels=28 * 28 * 40)).tokens(VISION) <= 40
    with pytest.raises(RequestError, match="more than 200 times"):
        mine.layout(noise((4000, 10)))


def test_angles_of_patches_are_those_of_transformers() -> None:
    config = Ernie4_5_VLMoeConfig(vision_config={"hidden_size": 160, "num_heads": 2}).vision_config
    grids = [(4, 6), (2, 2)]
    arrays = pack(np.zeros((28, VISION.patch_width), np.float32), grids, VISION).rows
    from transformers.vision_utils import get_vision_position_ids

    places = get_vision_position_ids(torch.tensor([(1, *grid) for grid in grids]), 2)
    cos, sin = Ernie4_5_VLMoeVisionRotaryEmbedding(config)(torch.zeros(1), places)
    np.testing.assert_allclose(arrays["rope_cos"], cos[:, :40], atol=1e-6)
    np.testing.assert_allclose(arrays["rope_sin"], sin[:, :40], atol=1e-6)


@pytest.mark.parametrize("sections", [(22, 22, 20), (3, 3, 58), (31, 31, 2)], ids=str)
def test_height_and_width_take_turns_before_time(sections: tuple[int, int, int]) -> None:
    height, width, time = sections
    parameters = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": list(sections)}
    text = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": parameters}
    theirs = Ernie4_5_VLMoeTextRotaryEmbedding(Ernie4_5_VLMoeConfig(text_config=text).text_config)
    places = np.random.default_rng(1).integers(0, 500, (3, 40))
    cos, sin = theirs(torch.zeros(1), torch.from_numpy(places)[:, None])
    rope = RopeMetadata(128, 5e5, (time, height, width), alternating=True)
    mine = rope_tables(places, rope)
    for ours_, wanted in zip(mine, (cos, sin), strict=True):
        np.testing.assert_allclose(ours_, wanted[0, :, ::2], atol=2e-5)
