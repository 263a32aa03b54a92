"""Aria: where its tensors lie, what is refused, and requests with images, all of which have as many visual tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.plan_launches import launches
from moevlm.export.build import build
from moevlm.export.families import family_for
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError, CheckpointError, RequestError, UnsupportedModelError
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from tests.support.bundles import edit_manifest
from tests.support.checkpoints import assert_same, canonical, names, refused, renamed, with_field
from tests.support.fakes.gpu import TARGET, gpu_bundle
from tests.support.gpu_steps import assert_steps_are_those_of_reference
from tests.support.requests import assert_alone_as_together, assert_parity, picture
from tests.support.tiny import TinyCheckpoint, edit_tensors

TARGETS = ("reference", "ort-cpu", "cpu:int8", "cpu:int4")
QUERIES = 6  # of an image of the tiny model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be left as it is."""
    return TinyCheckpoint("aria", text={"vocab_size": 96}, seed=86).save(tmp_path_factory.mktemp("aria") / "it")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_experts_named_as_transformers_parameters_are_the_same(saved: Path, copy: Path) -> None:
    from transformers import AutoModelForImageTextToText

    spelt = {"experts.fc1.weight": "experts.gate_up_proj", "experts.fc2.weight": "experts.down_proj"}
    directory = renamed(
        copy, lambda name: next((name.replace(*pair) for pair in spelt.items() if pair[0] in name), name)
    )
    assert any(name.endswith("experts.down_proj") for name in names(directory))
    _, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert_same(canonical(directory), canonical(saved))


def test_the_norm_behind_the_towers_last_block_is_not_asked_for(saved: Path, copy: Path) -> None:
    """Published checkpoints have none."""
    edit_tensors(copy, lambda tensors: [tensors.pop(n) for n in list(tensors) if "post_layernorm" in n])
    assert_same(canonical(copy), canonical(saved))


@pytest.mark.parametrize("width", [16, 32])
def test_experts_are_turned_even_if_they_are_square(width: int, tmp_path: Path) -> None:
    """With 32 values to a token, gates and ups of width 16 are square, and downs of width 32: shapes say nothing."""
    text = {"vocab_size": 96, "intermediate_size": width}
    directory = TinyCheckpoint("aria", text=text, seed=87).save(tmp_path / "checkpoint")
    stored: dict[str, torch.Tensor] = {}
    edit_tensors(directory, lambda tensors: stored.update(tensors))
    found, base = canonical(directory), "language_model.model.layers.0.mlp.experts"
    for ours, theirs in (("gate_up", "fc1"), ("down", "fc2")):
        wanted = stored[f"{base}.{theirs}.weight"]
        np.testing.assert_array_equal(found[f"decoder.layers.0.feed_forward.{ours}"], wanted.mT.numpy())
    plain = canonical(directory, "in_out")
    assert_same(plain, found)
    edit_tensors(directory, lambda tensors: tensors.update({n: t.mT for n, t in tensors.items() if ".experts." in n}))
    assert_same(canonical(directory, "out_in"), found)


def test_fewer_queries_than_config_json_says_are_refused_by_name(copy: Path) -> None:
    cut = "multi_modal_projector.query"
    edit_tensors(copy, lambda tensors: tensors.update({cut: tensors[cut][:5]}))
    told = "tensor model.multi_modal_projector.query has shape [5, 32], the config asks for 6 or more queries of 32"
    refused(CheckpointError, told, act=lambda: canonical(copy))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("text_config.model_type", "llama", 'text_config.model_type = "llama" (supported: aria_text)'),
        ("text_config.hidden_act", "gelu", 'text_config.hidden_act = "gelu" (supported: silu)'),
        ("text_config.mlp_bias", True, "text_config.mlp_bias = true (supported: false)"),
        ("text_config.model_type", "aria_moe_lm", 'text_config.model_type = "aria_moe_lm" (supported: aria_text)'),
        ("text_config.moe_topk", 9, "text_config.moe_topk = 9"),
        ("text_config.num_experts_per_tok", 3, "field in config.json: text_config.num_experts_per_tok = 3"),
        ("text_config.moe_intermediate_size", 8, "field in config.json: text_config.moe_intermediate_size = 8"),
        ("vision_config.attention_heads", 1, "field in config.json: vision_config.attention_heads = 1"),
        ("vision_feature_layer", -2, "vision_feature_layer = -2 (supported: -1, 2)"),
        ("vision_config.hidden_act", "relu", 'vision_config.hidden_act = "relu"'),
        ("vision_config.model_type", "siglip", 'vision_config.model_type = "siglip" (supported: idefics3_vision)'),
        ("vision_config.tie_last_hidden_states", True, "vision_config.tie_last_hidden_states = true"),
        ("vision_config.num_attention_heads", 3, "vision_config.num_attention_heads = 3"),
        ("image_token_index", 96, "image_token_index = 96"),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" not in value else None,
)
def test_value_that_is_not_supported_is_refused_by_name(path: str, value: Any, told: str, saved: Path) -> None:
    config = with_field(saved, path, value)
    refused(UnsupportedModelError, told, act=lambda: family_for(config).config(config))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (
            "vision_config.patch_size",
            16,
            "vision_config.patch_size = 16 (allowed: a divisor of 980, the side of an image)",
        ),
        (
            "vision_config.image_size",
            139,
            "vision_config.image_size = 139 (allowed: 140, the side of a patch, or more)",
        ),
        (
            "projector_patch_to_query_dict",
            {"16": 4},
            "(allowed: 49 among them, the patches of an image with its padding)",
        ),
        (
            "projector_patch_to_query_dict",
            {"49": 0},
            "projector_patch_to_query_dict.49 = 0 (allowed: an integer from 1 to ",
        ),
        ("projector_patch_to_query_dict", 6, "projector_patch_to_query_dict = 6 (allowed: an object)"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)
def test_value_that_cannot_be_is_refused_by_name(path: str, value: Any, told: str, saved: Path) -> None:
    config = with_field(saved, path, value)
    refused(CheckpointError, told, act=lambda: family_for(config).config(config))


def test_config_of_aria_is_understood() -> None:
    """Fields that it leaves out have transformers' defaults; some are of training, or say again what others do."""
    text = {
        **{"model_type": "aria_text", "hidden_size": 2560, "intermediate_size": 1664, "num_hidden_layers": 28},
        **{"num_attention_heads": 20, "moe_num_experts": 64, "moe_topk": 6, "vocab_size": 100352},
        **{"max_position_embeddings": 65536, "rope_theta": 5000000, "moe_z_loss_coeff": 1e-5},
        **{"num_experts_per_tok": 6, "moe_intermediate_size": 1664},
    }
    vision = {
        **{"model_type": "idefics3_vision", "image_size": 980, "intermediate_size": 4304, "attention_heads": 16},
        **{"num_hidden_layers": 27, "patch_size": 14},
    }
    values = {"model_type": "aria", "text_config": text, "vision_config": vision, "ignore_index": -100}
    config = family_for(values).config(values)
    assert {(moe.experts, moe.router.top_k, moe.width, moe.shared_width) for moe in config.moe.values()} == {
        (64, 6, 1664, 3328)
    }
    assert (config.image_token_id, config.eos_token_ids, len(config.moe)) == (9, (2,), 28)
    assert config.vision is not None
    assert config.tower is not None
    assert (config.vision.hidden, config.vision.heads, config.vision.depth) == (1152, 16, 27)
    assert (config.tower.tokens((70, 48)), config.tower.tokens((24, 70)), config.tower.position_grid) == (256, 256, 70)
    (layer,) = {layer.mixer for layer in config.decoder.layers}
    assert (layer.heads, layer.kv_heads, layer.head_dim) == (20, 20, 128)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """And its checkpoint."""
    folder = tmp_path_factory.mktemp("bundle")
    checkpoint = TinyCheckpoint("aria", side_files=True, seed=88).save(folder / "checkpoint")
    return build(checkpoint, folder / "tiny.moevlm", TARGETS), checkpoint


def test_every_target_and_its_requests_pass_parity(bundle: tuple[Bundle, Path]) -> None:
    assert assert_parity(*bundle, TARGETS) == ()


def test_costs_count_the_towers_blocks_by_the_patch_and_its_queries_by_the_image(bundle: tuple[Bundle, Path]) -> None:
    cost, hidden, out = bundle[0].manifest.engines["reference"].cost, 32, 32
    assert cost is not None
    block, of_patches = 4 * hidden**2 + 2 * hidden * 40, 4 * hidden**2  # both of keys, both of values
    assert cost.patch_macs == 3 * 140**2 * hidden + 2 * block + of_patches + 2 * QUERIES * hidden
    assert cost.image_macs == QUERIES * (2 * hidden**2 + 2 * hidden**2 + hidden * out + out**2)
    assert cost.patch_pair_macs == 2 * 2 * hidden


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("queries", 0, "1 to 65536"),
        ("queries", 1 << 17, "1 to 65536"),
        ("side", 0, "1 to 1024"),
        ("side", 1024, "images of up to 67108864 pixels"),
        ("merge_size", 2, "1 to 1"),
        ("position_grid", 0, "1 to 16384"),
        ("rope_theta", 1e4, "0 to 0"),
    ],
)
def test_a_manifest_with_another_tower_is_refused_by_name(
    field: str, value: Any, allowed: str, bundle: tuple[Bundle, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle[0].directory, tmp_path / "copy"))
    edit_manifest(copy, lambda manifest: manifest["model"]["vision"].update({field: value}))
    refused(BundleError, f"model.vision.{field} = {value}", allowed, act=lambda: Bundle.open(copy))


def test_every_image_has_as_many_tokens_alone_and_beside_others(bundle: tuple[Bundle, Path]) -> None:
    with load_runtime(bundle[0].directory, "cpu:int8", LoadOptions(threads=1)) as runtime:
        wide, small = picture(48, 20), picture(16, 16)
        messages = [{"role": "user", "content": [wide, {"type": "text", "text": "?"}, small]}]
        prompt = runtime.prompt(messages)
        assert prompt.image_tokens == 2 * QUERIES == prompt.ids.tolist().count(runtime.model.image_token_id)
        np.testing.assert_array_equal(prompt.positions, [range(len(prompt.ids))] * 3)
        assert runtime.prompt(messages, max_image_tokens=QUERIES).image_tokens == 2 * QUERIES
        with pytest.raises(RequestError, match=r"^unsupported value max_image_tokens = 5 \(allowed: 6, which every "):
            runtime.prompt(messages, max_image_tokens=QUERIES - 1)
        many = [{"role": "user", "content": [small] * 90}]
        with pytest.raises(
            RequestError, match=r"86 of the prompt's 90 images have 516 tokens, the model's context 512$"
        ):
            runtime.prompt(many)
        assert_alone_as_together(runtime, prompt)


def test_steps_on_a_gpu_are_given_the_tokens_of_every_image(bundle: tuple[Bundle, Path], tmp_path: Path) -> None:
    """On a fake GPU that evaluates the canonical graphs, with images that no call of the tower takes at once."""
    parts: list[list[dict[str, Any]]] = [[picture(48, 20), picture(16, 16)], [picture(32, 48)], []]
    requests = [[{"role": "user", "content": [*images, {"type": "text", "text": "is?"}]}] for images in parts]
    directory = gpu_bundle(bundle[0].directory, tmp_path)
    edit_manifest(directory, lambda manifest: manifest["engines"][TARGET]["tensorrt"].update(max_patches=60))
    assert_steps_are_those_of_reference(directory, requests, tmp_path)


def test_tensorrt_rtx_builds_plans_of_its_tower_and_its_decoder(saved: Path, tmp_path: Path) -> None:
    bundle = build(saved, tmp_path / "b.moevlm", ["rtx:sm89"])
    engine = bundle.manifest.engines["rtx:sm89:bf16"]
    for plan, plugins in (
        (engine.decoder, {"PagedAttention": 2}),
        (engine.vision, {"SegmentAttention": 2, "CrossAttention": 1}),
    ):
        for profile in launches(bundle.path(plan).read_bytes()):
            found = [launch.plugin for launch in profile]
            assert {plugin: found.count(plugin) for plugin in plugins} == plugins
