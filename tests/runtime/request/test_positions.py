"""Token positions and rotary tables equal Hugging Face's."""

import numpy as np
import pytest
import torch
from transformers import Gemma4TextConfig, Glm4vMoeConfig, Qwen3VLMoeConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeModel, Glm4vMoeTextRotaryEmbedding
from transformers.models.mistral4.modeling_mistral4 import get_llama_4_attn_scale
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel, Qwen3VLMoeTextRotaryEmbedding

from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.core.manifest import LayerMetadata, ModelMetadata, QueryScaleMetadata, RopeMetadata
from moevlm.runtime.core.rotary import inverse_frequencies
from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.request.positions import query_scales, rope_positions, rope_tables

IMAGE = 9
INTERLEAVED = RopeMetadata(dim=128, theta=5e6, sections=(24, 20, 20), interleaved=True)
SECTIONED = RopeMetadata(dim=64, theta=1e4, sections=(8, 12, 12), interleaved=False)
TINY = RopeMetadata(dim=16, theta=5e5, sections=(24, 20, 20), interleaved=True)
MERGES = pytest.mark.parametrize("merge", [1, 2, 3])


def model_facts(merge: int, rope: RopeMetadata = TINY) -> ModelMetadata:
    vision = GridTower(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=merge,
        channels=3,
        head_dim=8,
        rope_theta=1e4,
        position_grid=6,
        position_resampling="bilinear",
        deepstack=0,
    )
    return ModelMetadata(
        model_type="test",
        hidden=8,
        vocabulary=10,
        context=1 << 20,
        layers=(LayerMetadata(heads=1, kv_heads=1, key_dim=8, value_dim=8, experts=2, top_k=1),),
        eos_token_ids=(0,),
        image_token_id=IMAGE,
        ropes=(rope,),
        vision=vision,
    )


def hugging_face_model(family: str, merge: int) -> torch.nn.Module:
    """A model without weights: get_rope_index reads the configuration only."""
    text = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "spatial_merge_size": merge}
    with torch.device("meta"):
        if family == "qwen":
            return Qwen3VLMoeModel(Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=IMAGE))
        return Glm4vMoeModel(Glm4vMoeConfig(text_config=text, vision_config=vision, image_token_id=IMAGE))


def prompt(texts: list[int], grids: list[tuple[int, int]], merge: int) -> np.ndarray:
    """Token ids: texts[0] text tokens, image 0, texts[1] text tokens, ..."""
    pieces = [np.full(texts[0], 1)]
    for length, (h, w) in zip(texts[1:], grids, strict=True):
        pieces += [np.full(h * w // merge**2, IMAGE), np.full(length, 1)]
    return np.concatenate(pieces).astype(np.int64)


@MERGES
@pytest.mark.parametrize("family", ["qwen", "glm"])
def test_positions_equal_hugging_faces_rope_index(family: str, merge: int) -> None:
    model = hugging_face_model(family, merge)
    rng = np.random.default_rng(merge)
    for images in [0, 1, 2, 5, 5]:
        grids = [(int(h), int(w)) for h, w in rng.integers(1, 14, (images, 2)) * merge]
        # Text before and behind may be absent; between two images there always is some.
        texts = [int(n) for n in rng.integers(1, 30, images + 1)]
        texts[0] = int(rng.integers(0, 2)) * texts[0] if images else texts[0]
        texts[-1] = int(rng.integers(0, 2)) * texts[-1] if images else texts[-1]
        ids = prompt(texts, grids, merge)
        wanted, delta = model.get_rope_index(
            torch.from_numpy(ids)[None],
            torch.from_numpy(ids == IMAGE).int()[None],
            torch.tensor([(1, h, w) for h, w in grids]) if grids else None,
        )
        positions, following = rope_positions(ids, grids, model_facts(merge))
        assert positions.dtype == np.int64
        np.testing.assert_array_equal(positions, wanted[:, 0])
        assert following == len(ids) + int(delta)


def test_two_images_side_by_side_follow_each_other() -> None:
    positions, following = rope_positions(np.array([1, *[IMAGE] * 5, 1]), [(2, 4), (6, 2)], model_facts(2))
    np.testing.assert_array_equal(positions, [[0, 1, 1, 3, 3, 3, 6], [0, 1, 1, 3, 4, 5, 6], [0, 1, 2, 3, 3, 3, 6]])
    assert following == 7


def test_an_empty_prompt_has_no_positions() -> None:
    positions, following = rope_positions(np.zeros(0, np.int64), [], model_facts(2))
    assert (positions.shape, following) == ((3, 0), 0)


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, IMAGE, 1], [], r"has 1 image tokens \(id 9\), its 0 images need 0"),
        ([1, IMAGE, 1], [(2, 4)], r"has 1 image tokens \(id 9\), its 1 images need 2"),
        ([1, 1], [(2, 2)], r"has 0 image tokens \(id 9\), its 1 images need 1"),
        ([IMAGE, 1, IMAGE], [(2, 4)], "image 1 are not in one piece"),
        ([IMAGE, 1, IMAGE, 1, IMAGE], [(2, 2), (4, 2)], "image 2 are not in one piece"),
    ],
)
def test_image_tokens_that_do_not_match_the_images_are_refused(
    ids: list[int], grids: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        rope_positions(np.array(ids), grids, model_facts(2))


def rotary_module(rope: RopeMetadata) -> torch.nn.Module:
    parameters = {"rope_type": "default", "rope_theta": rope.theta, "mrope_section": list(rope.sections)}
    if rope.interleaved:
        text = {"head_dim": rope.dim, "rope_parameters": parameters}
        return Qwen3VLMoeTextRotaryEmbedding(Qwen3VLMoeConfig(text_config=text).text_config)
    text = {"head_dim": 2 * rope.dim, "rope_parameters": parameters | {"partial_rotary_factor": 0.5}}
    return Glm4vMoeTextRotaryEmbedding(Glm4vMoeConfig(text_config=text).text_config)


@pytest.mark.parametrize("rope", [INTERLEAVED, SECTIONED, TINY], ids=["interleaved", "sectioned", "short interleaved"])
def test_tables_equal_hugging_faces_rotary_module(rope: RopeMetadata) -> None:
    positions = np.random.default_rng(2).integers(0, 260_000, (3, 2, 5_000))
    positions[:, :, :100] = np.arange(100)
    module = rotary_module(rope)
    half = rope.dim // 2
    cos, sin = rope_tables(positions, rope)
    # A frequency may be a float32 unit in the last place apart (PyTorch's powf is not correctly rounded), which the
    # next test bounds; here both sides get the same ones.
    np.testing.assert_array_max_ulp(module.inv_freq.numpy(), inverse_frequencies(rope.dim, rope.theta), maxulp=1)
    module.inv_freq = torch.from_numpy(inverse_frequencies(rope.dim, rope.theta))
    for ours, theirs in zip((cos, sin), module(torch.zeros(1), torch.from_numpy(positions)), strict=True):
        assert (ours.dtype, ours.shape) == (np.float32, (2, 5_000, half))
        np.testing.assert_allclose(ours, theirs[..., :half], rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("rope", [INTERLEAVED, SECTIONED], ids=["interleaved", "sectioned"])
def test_tables_of_short_prompts_equal_the_unchanged_module(rope: RopeMetadata) -> None:
    positions = np.random.default_rng(6).integers(0, 4_096, (3, 500))
    theirs = rotary_module(rope)(torch.zeros(1), torch.from_numpy(positions)[:, None])
    # One unit in the last place of a frequency, at the longest angle.
    tolerance = 1.2e-7 * (1 + 4_096 * inverse_frequencies(rope.dim, rope.theta))
    for mine, other in zip(rope_tables(positions, rope), theirs, strict=True):
        assert mine.shape == (500, rope.dim // 2)
        assert (np.abs(mine - other[0, :, : rope.dim // 2].numpy()) <= tolerance).all()


@pytest.mark.parametrize(("kind", "turning"), [("sliding_attention", 0), ("full_attention", 8)])
def test_tables_of_counted_positions_equal_gemmas_module(kind: str, turning: int) -> None:
    module = Gemma4TextRotaryEmbedding(Gemma4TextConfig(head_dim=32, global_head_dim=64, num_hidden_layers=6))
    dim, theta = (64, 1e6) if turning else (32, 1e4)
    turns = np.append(inverse_frequencies(dim, theta)[:turning], np.zeros(dim // 2 - turning, np.float32))
    rope = RopeMetadata(dim=dim, theta=theta, frequencies=tuple(turns.tolist()) if turning else ())
    positions = np.random.default_rng(8).integers(0, 4_096, 500)
    theirs = module(torch.zeros(1), torch.from_numpy(positions)[None], kind)
    tolerance = 1.2e-7 * (1 + 4_096 * inverse_frequencies(dim, theta))
    for mine, other in zip(rope_tables(np.stack([positions] * 3), rope), theirs, strict=True):
        assert mine.shape == (500, dim // 2)
        assert (np.abs(mine - other[0, :, : dim // 2].numpy()) <= tolerance).all()


def test_without_sections_image_tokens_count_like_text() -> None:
    model = model_facts(2, RopeMetadata(dim=8, theta=1e4))
    positions, following = rope_positions(np.array([1, *[IMAGE] * 6, 1]), [(4, 6)], model)
    np.testing.assert_array_equal(positions, [range(8)] * 3)
    assert following == 8
    with pytest.raises(RequestError, match="image 1 are not in one piece"):
        rope_positions(np.array([IMAGE, 1, IMAGE]), [(2, 4)], model)


def test_each_frequency_turns_with_its_own_axis() -> None:
    for rope, first in [(INTERLEAVED, [0, 1, 2, 0, 1, 2]), (SECTIONED, [0] * 6)]:
        _, sin = rope_tables(np.eye(3, dtype=np.int64), rope)
        axis = (sin != 0).argmax(axis=0)
        assert axis[:6].tolist() == first
        assert np.bincount(axis).tolist() == list(rope.sections)


def test_text_positions_make_ordinary_rope() -> None:
    positions = np.repeat(np.arange(9_000)[None], 3, axis=0)
    cos, sin = rope_tables(positions, INTERLEAVED)
    angle = np.arange(9_000, dtype=np.float32)[:, None] * inverse_frequencies(128, 5e6)
    np.testing.assert_allclose(cos, np.cos(angle.astype(np.float64)), rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(sin, np.sin(angle.astype(np.float64)), rtol=0, atol=1.2e-7)


def test_sections_that_do_not_cover_the_frequencies_are_refused() -> None:
    rope = RopeMetadata(dim=64, theta=1e4, sections=(8, 12, 11), interleaved=False)
    with pytest.raises(BundleError, match=r"model\.ropes\.sections = \[8, 12, 11\].*add up to dim / 2 = 32"):
        rope_tables(np.zeros((3, 1), np.int64), rope)


PLACES = np.unique(np.concatenate([np.arange(40000), *(8192 * np.arange(1, 129)[:, None] + [-2, -1, 0, 1]).T]))


def test_factors_of_queries_are_those_of_mistral_4_and_of_llama_4() -> None:
    places = torch.from_numpy(PLACES)
    mistral = get_llama_4_attn_scale(places[None], 0.1, 8192).flatten().numpy()
    np.testing.assert_array_max_ulp(query_scales(PLACES, QueryScaleMetadata(beta=0.1, original=8192)), mistral, 1)
    # As in `Llama4TextAttention.forward`, where it is not a function of its own.
    llama = (torch.log1p(torch.floor((places.float() + 1.0) / 8192)) * 0.1 + 1.0).numpy()
    scale = QueryScaleMetadata(beta=0.1, original=8192, offset=1)
    np.testing.assert_array_max_ulp(query_scales(PLACES, scale), llama, 1)
    assert query_scales(np.array([8190, 8191]), scale).tolist()[0] == 1.0 < query_scales(np.array([8191]), scale)[0]
