"""Images in one call, whatever their processor: the rows of each, one image behind the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moevlm.runtime.request.images.registry import image_processor
from moevlm.runtime.request.vision_inputs import pack
from tests.runtime.request import (
    test_aria_images,
    test_ernie_images,
    test_gemma4_images,
    test_got_ocr2_images,
    test_kimi_k25_images,
    test_llama4_images,
    test_pixtral_images,
)
from tests.support.images import noise

PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "aria": (test_aria_images, {}),
    "ernie": (test_ernie_images, {}),
    "gemma4": (test_gemma4_images, {"max_soft_tokens": 70}),
    "got_ocr2": (test_got_ocr2_images, {}),
    "kimi_k25": (test_kimi_k25_images, {}),
    "llama4": (test_llama4_images, {}),
    "pixtral": (test_pixtral_images, {}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_of_different_sizes_in_one_call_equal_single_calls(name: str) -> None:
    kind, fields = PROCESSORS[name]
    ours, vision = image_processor(kind.KIND | fields, kind.VISION), kind.VISION
    images = [piece for size in ((300, 100), (20, 700), (64, 64)) for piece in ours.fit(noise(size))]
    packed, grids = ours.pack(images)
    singles = [ours.pack([image])[0] for image in images]
    assert packed.rows.keys() == vision.inputs.keys()
    for name, rows in packed.rows.items():
        width, dtype = vision.inputs[name]
        assert (rows.shape[1:], rows.dtype) == ((width,), dtype)
        np.testing.assert_array_equal(rows, np.concatenate([single.rows[name] for single in singles]), err_msg=name)
    np.testing.assert_array_equal(np.diff(packed.image_start), [h * w for h, w in grids])


@pytest.mark.parametrize("name", PROCESSORS)
def test_no_image_gives_inputs_of_no_patches(name: str) -> None:
    vision = PROCESSORS[name][0].VISION
    inputs = pack(np.zeros((0, vision.patch_width), np.float32), [], vision)
    assert [(name, len(rows)) for name, rows in inputs.rows.items()] == [(name, 0) for name in vision.inputs]
    assert inputs.image_start.tolist() == [0]
