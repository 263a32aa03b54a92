"""Gemma 4's image processor: sizes, patches and places as transformers' Pillow backend has them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.core.manifest import ImageMarks, RopeMetadata
from moevlm.runtime.core.towers import GridTower, PooledTower
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.request.image_limits import ImageLimits
from moevlm.runtime.request.images.blocks import block_order
from moevlm.runtime.request.images.registry import image_processor
from moevlm.runtime.request.prompt_builder import PromptBuilder
from tests.runtime.request.test_chat import CORE, MODEL, PLAIN, TOKENIZER
from tests.support.images import noise

VISION = PooledTower(patch_size=16, merge_size=3, channels=3, head_dim=72, rope_theta=100.0, position_table=10240)
KIND = {"image_processor_type": "Gemma4ImageProcessor"}
SIZES = [(640, 480), (1, 1), (17, 400), (4000, 30), (3, 2999), (48, 48), (47, 49), (1023, 767), (97, 611), (2000, 1999)]


def ours(vision: PooledTower = VISION, **fields: Any) -> Any:
    return image_processor(KIND | fields, vision)


def assert_as_transformers(image: Image.Image, vision: PooledTower = VISION, **fields: Any) -> None:
    wanted = Gemma4ImageProcessorPil(**fields)(images=[image], return_tensors="np")
    mine = ours(vision, **fields)
    inputs, [(height, width)] = mine.pack(mine.fit(mine.open(image)))
    places = wanted["image_position_ids"][0]
    real = places[:, 0] >= 0
    assert (width, height) == tuple(places.max(axis=0) + 1)
    assert mine.layout(image).tokens(vision) == vision.tokens((height, width)) == wanted["num_soft_tokens_per_image"][0]
    rows, columns = block_order([(height, width)], vision.merge_size)
    order = rows * width + columns
    pixels = 2 * (wanted["pixel_values"][0][real][order] - np.float32(0.5))  # as the tower does it
    np.testing.assert_array_equal(inputs.pixel_patches, pixels)
    np.testing.assert_array_equal(np.stack([columns, rows], axis=1), places[real][order])
    index = inputs.rows["position_index"]
    np.testing.assert_array_equal(index - [0, vision.position_table], places[real][order])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_cut_as_transformers_does(size: tuple[int, int]) -> None:
    assert_as_transformers(noise(size))


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_and_budgets_are_those_of_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(4):
        width, height = (int(2**exponent) for exponent in rng.uniform(1, 10, 2))
        fields = {"patch_size": int(rng.choice([4, 7, 16])), "pooling_kernel_size": int(rng.choice([1, 2, 3, 4]))}
        vision = msgspec.structs.replace(
            VISION, patch_size=fields["patch_size"], merge_size=fields["pooling_kernel_size"]
        )
        mode = str(rng.choice(["RGB", "L", "P", "RGBA", "1"]))
        image = noise((width, height), seed, mode)
        assert_as_transformers(image, vision, max_soft_tokens=int(rng.choice([70, 140, 280])), **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 1.0]},
        {"rescale_factor": 1 / 127},
        {"resample": 2},
    ],
    ids=str,
)
def test_fields_change_pixels_as_in_transformers(fields: dict[str, Any]) -> None:
    assert_as_transformers(noise((300, 200)), **fields)


def test_max_patches_is_the_budget() -> None:
    assert ours(max_soft_tokens=140).max_patches == 140 * 9


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (ImageLimits(max_tokens=5), 5),
        (ImageLimits(max_pixels=48 * 48 * 7), 7),
        (ImageLimits(max_pixels=48 * 48 * 500), 500),
        (ImageLimits(low_detail=True), 512 * 512 // 48**2),
        (ImageLimits(max_tokens=1), 1),
        (ImageLimits(max_tokens=9, low_detail=True, max_pixels=48 * 48 * 100), 9),
    ],
    ids=str,
)
def test_limits_of_a_request_bound_the_tokens(limits: ImageLimits, most: int) -> None:
    mine = ours()
    for size in SIZES:
        image = noise(size)
        (fitted,) = mine.fit(image, limits)
        tokens = VISION.tokens(mine.grid(fitted))
        assert 1 <= tokens <= most
        assert mine.layout(image, limits).tokens(VISION) == tokens
        assert fitted.width % 48 == fitted.height % 48 == 0


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (ImageLimits(min_pixels=4096), r"^unsupported value min_pixels = 4096 \(allowed: none, "),
        (
            ImageLimits(max_pixels=2303),
            r"^unsupported value max_pixels = 2303 \(allowed: 2304, which is one token, to ",
        ),
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
        ({"max_soft_tokens": 100}, r"max_soft_tokens = 100 \(supported: 70, 140, 280, 560, 1120\)"),
        ({"max_soft_tokens": 280.0}, r"max_soft_tokens = 280\.0 \(supported: "),
        ({"max_soft_tokens": True}, "max_soft_tokens = "),
        ({"patch_size": 14}, r"patch_size = 14 \(supported: 16, as in manifest\.json\)"),
        ({"pooling_kernel_size": 2}, r"pooling_kernel_size = 2 \(supported: 3, as in manifest\.json\)"),
        ({"do_resize": False}, r"do_resize = "),
        ({"do_pad": True}, r"do_pad = "),
    ],
    ids=str,
)
def test_fields_that_cannot_be_reproduced_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        ours(**fields)


def test_a_budget_beyond_the_learned_positions_is_refused() -> None:
    with pytest.raises(BundleError, match=r"max_soft_tokens = 280 \(supported: up to 70, "):
        ours(msgspec.structs.replace(VISION, position_table=210))


def test_processors_of_other_towers_are_refused_by_name() -> None:
    with pytest.raises(BundleError, match=r'image_processor_type = "Qwen2VLImageProcessor" \(supported: Gemma4Image'):
        image_processor({"image_processor_type": "Qwen2VLImageProcessor"}, VISION)
    grid = GridTower(
        patch_size=14,
        merge_size=2,
        channels=3,
        head_dim=8,
        rope_theta=1e4,
        temporal_patch_size=2,
        position_grid=4,
        position_resampling="bilinear",
    )
    with pytest.raises(BundleError, match=r"\(supported: Glm46VImageProcessor, Glm4vImageProcessor, Qwen2VL"):
        image_processor(KIND, grid)


def test_the_references_own_fields_are_taken() -> None:
    image_processor(Gemma4ImageProcessorPil().to_dict(), VISION)


def test_fields_as_published_are_taken_and_size_says_nothing() -> None:
    """google/gemma-4-26B-A4B-it, processor_config.json: image_processor."""
    assert_as_transformers(
        noise((310, 190)),
        do_convert_rgb=True,
        do_normalize=False,
        do_rescale=True,
        do_resize=True,
        image_mean=[0.0, 0.0, 0.0],
        image_seq_length=280,
        image_std=[1.0, 1.0, 1.0],
        max_soft_tokens=280,
        patch_size=16,
        pooling_kernel_size=3,
        resample=3,
        rescale_factor=1 / 255,
        size={"height": 224, "width": 224},
    )


def test_a_prompt_is_what_transformers_processor_writes_around_images() -> None:
    """Gemma4Processor puts begin, soft tokens and end into the text, and reads it."""
    begin, end = (TOKENIZER.special[name] for name in ("<|im_start|>", "[Z]"))
    model = msgspec.structs.replace(
        MODEL,
        vision=VISION,
        image_marks=ImageMarks(begin=(begin,), end=(end,)),
        ropes=(RopeMetadata(dim=4, theta=1e4, sections=(), interleaved=False),),
    )
    images = [noise((100, 30)), noise((64, 200))]
    mine = ours(max_soft_tokens=70)
    parts = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [parts[0], {"type": "text", "text": " and "}, parts[1]]}]
    prompt = PromptBuilder(model, TOKENIZER, ChatTemplate(PLAIN), mine).build(messages)
    counts = [
        int(n)
        for n in Gemma4ImageProcessorPil(max_soft_tokens=70)(images=images, return_tensors="np")[
            "num_soft_tokens_per_image"
        ]
    ]
    head, between, tail = str(ChatTemplate(PLAIN).render(messages)).split("<|image_pad|>")
    first, second = (f"<|im_start|>{'<|image_pad|>' * count}[Z]" for count in counts)
    assert prompt.ids.tolist() == CORE.encode(head + first + between + second + tail).ids
    assert prompt.image_tokens == sum(counts)
    np.testing.assert_array_equal(prompt.positions, np.tile(np.arange(len(prompt.ids)), (3, 1)))
    assert prompt.next_position == len(prompt.ids)
