"""Kimi-K2.5's image processor: sizes and pixels as transformers' own code has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from moevlm.export.parity.oracle_images import oracle_images
from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.core.towers import MoonTower
from moevlm.runtime.request.image_limits import ImageLimits
from moevlm.runtime.request.images.registry import image_processor
from tests.support import images
from tests.support.torchvision import in_place_of_torchvision

VISION = MoonTower(patch_size=14, merge_size=2, channels=3, head_dim=72, rope_theta=1e4, position_grid=64)
KIND = {"image_processor_type": "Kimi_K25ImageProcessor"}
SIZES = [(640, 480), (1, 1), (17, 400), (2000, 30), (28, 28), (29, 27), (1023, 767), (97, 611), (8, 7300), (1800, 2000)]


@pytest.fixture(scope="module")
def theirs() -> Iterator[type]:
    with in_place_of_torchvision("transformers.models.kimi_k25.image_processing_kimi_k25") as module:
        yield module.Kimi_K25ImageProcessor


def noise(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Of bytes in the middle: where one pass goes beyond 0 or 255, the other library's order of passes shows."""
    return images.noise(size, seed).point(lambda value: 64 + value // 2).convert(mode)


def ours(vision: MoonTower = VISION, **fields: Any) -> Any:
    return image_processor(KIND | fields, vision)


def assert_as_transformers(theirs: type, image: Image.Image, vision: MoonTower = VISION, **fields: Any) -> None:
    wanted = theirs(**fields)(images=[image], return_tensors="np")
    grids, patches = oracle_images(vision).patches(wanted, vision)
    mine = ours(vision, **fields)
    inputs, packed = mine.pack(mine.fit(mine.open(image)))
    assert packed == mine.layout(image).grids == grids
    assert len(patches) <= mine.max_patches
    difference = np.abs(inputs.pixel_patches - patches)
    # Two libraries resize, and each rounds after columns and after rows.
    assert difference.max() <= 2.001 * np.diff(mine.values).max()
    assert (difference > 1e-6).mean() < 0.2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_cut_as_transformers_does(theirs: type, size: tuple[int, int]) -> None:
    assert_as_transformers(theirs, noise(size))
    assert_as_transformers(theirs, noise(size), max_patches=500)


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_and_budgets_are_those_of_transformers(theirs: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(6):
        width, height = (int(2**exponent) for exponent in rng.uniform(1, 10, 2))
        sizes = {"patch_size": int(rng.choice([4, 7, 14])), "merge_size": int(rng.choice([1, 2, 3]))}
        side = int(rng.integers(3, 60))
        fields = sizes | {"max_patches": int(rng.integers(4, 900)), "size": {"max_height": side, "max_width": side}}
        mode = str(rng.choice(["RGB", "L", "RGBA"]))
        assert_as_transformers(
            theirs, noise((width, height), seed, mode), msgspec.structs.replace(VISION, **sizes), **fields
        )


@pytest.mark.parametrize("budget", [1, 7, 300, 16384])
@pytest.mark.parametrize("side", [3, 64, 512])
def test_no_image_has_more_patches_than_the_processor_says(budget: int, side: int) -> None:
    mine = ours(max_patches=budget, size={"max_height": side, "max_width": side})
    rng = np.random.default_rng(budget)
    sizes = np.exp2(rng.uniform(0, 14, (2000, 2))).astype(int).tolist()
    edges = [[14 * side + h, 14 * a + w] for a in (1, 2, 31, side) for h in (-1, 0, 1) for w in (-1, 0, 1, 13)]
    found = [mine._resized(height, width, ImageLimits()) for height, width in [*sizes, *edges]]
    most = max(height * width // 14**2 for height, width in found)
    assert most <= mine.max_patches
    assert budget < 300 or mine.max_patches <= 1.2 * most + 64


@pytest.mark.parametrize(
    "fields",
    [
        {"do_normalize": False},
        {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]},
        {"rescale_factor": 1 / 127},
        {"resample": 2},
    ],
    ids=str,
)
def test_fields_change_pixels_as_in_transformers(theirs: type, fields: dict[str, Any]) -> None:
    assert_as_transformers(theirs, noise((300, 200)), **fields)


def test_the_file_as_published_says_what_transformers_has_as_defaults(theirs: type) -> None:
    """moonshotai/Kimi-K2.5, preprocessor_config.json: no type, and all in one object."""
    published = {
        "auto_map": {"AutoImageProcessor": "kimi_k25_vision_processing.KimiK25VisionProcessor"},
        "media_proc_cfg": {
            "in_patch_limit": 16384,
            "patch_size": 14,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "merge_kernel_size": 2,
            "fixed_output_tokens": None,
            "patch_limit_on_one_side": 512,
            "in_patch_limit_each_frame": 4096,
            "in_patch_limit_video": None,
            "max_num_frames_each_video": None,
            "timestamp_mode": "hh:mm:ss.fff",
            "config_type": "media_proc.processors.moonvit.MoonViTMediaProcessorConfig",
            "sample_fps": 2.0,
            "temporal_merge_kernel_size": 4,
        },
    }
    image = noise((4000, 2100))
    mine, default = image_processor(published, VISION), ours()
    assert mine.layout(image) == default.layout(image)
    np.testing.assert_array_equal(mine.values, default.values)
    assert mine.max_patches == default.max_patches
    other = published | {"media_proc_cfg": {"in_patch_limit": 100, "patch_limit_on_one_side": 7}}
    (grid,) = image_processor(other, VISION).layout(image).grids
    wanted = theirs(max_patches=100, size={"max_height": 7, "max_width": 7})(images=[image], return_tensors="np")
    assert grid == tuple(wanted["image_grid_thw"][0][1:])


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (ImageLimits(max_tokens=90), 90),
        (ImageLimits(max_pixels=28 * 28 * 300), 300),
        (ImageLimits(low_detail=True), 512 * 512 // 28**2),
        (ImageLimits(max_tokens=100, low_detail=True, max_pixels=28 * 28 * 200), 100),
    ],
    ids=str,
)
def test_limits_of_a_request_bound_the_tokens(limits: ImageLimits, most: int) -> None:
    mine = ours()
    for size in [(640, 480), (1, 1), (700, 400), (1800, 2000), (97, 611)]:
        image = noise(size)
        (piece,) = mine.fit(image, limits)
        tokens = VISION.tokens(mine.grid(piece))
        assert 1 <= tokens <= most
        assert mine.layout(image, limits).tokens(VISION) == tokens
        assert tokens > 0.8 * most or tokens == mine.layout(image).tokens(VISION)


@pytest.mark.parametrize(
    ("size", "limits", "words"),
    [
        ((30, 30), ImageLimits(min_pixels=4096), r"^unsupported value min_pixels = 4096 \(allowed: none, "),
        ((30, 30), ImageLimits(max_pixels=783), r"^unsupported value max_pixels = 783 \(allowed: 784, which is one "),
        ((30, 30), ImageLimits(max_pixels=1 << 40), r"^unsupported value max_pixels = 1099511627776 \(allowed: "),
        ((30, 30), ImageLimits(max_tokens=0), r"^unsupported value max_image_tokens = 0 "),
        ((2000, 10), ImageLimits(max_tokens=2), r"^image is 2000 x 10 pixels, which is too elongated for 2 visual"),
    ],
    ids=str,
)
def test_limits_that_cannot_be_are_refused_by_name(size: tuple[int, int], limits: ImageLimits, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ours().fit(noise(size), limits)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": {"max_height": 512, "max_width": 256}}, r"size = .*\(supported: max_height = max_width, from 1 to "),
        ({"size": {"longest_edge": 512}}, "size = "),
        ({"max_patches": 0}, "max_patches = 0"),
        ({"patch_size": 16}, r"patch_size = 16 \(supported: 14, as in manifest\.json\)"),
        ({"merge_size": 1}, r"merge_size = 1 \(supported: 2, as in manifest\.json\)"),
        ({"resample": 1}, r"resample = 1 \(supported: 2, 3\)"),
        ({"do_resize": False}, r"do_resize = "),
        ({"media_proc_cfg": {"fixed_output_tokens": 64}}, "media_proc_cfg = .*fixed_output_tokens"),
        ({"media_proc_cfg": {"patch_size": 16}}, "patch_size = 16"),
        ({"media_proc_cfg": {"in_patch_floor": 4}}, r"media_proc_cfg.in_patch_floor = 4 \(supported: absent\)"),
    ],
    ids=str,
)
def test_fields_that_cannot_be_reproduced_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        ours(**fields)


def test_the_references_own_fields_are_taken(theirs: type) -> None:
    image_processor(theirs().to_dict(), VISION)
