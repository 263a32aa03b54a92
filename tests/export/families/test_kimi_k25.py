"""Kimi-K2.5: where its tensors lie, what is refused, and requests with images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.plan_launches import launches
from moevlm.export.build import build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.families import family_for
from moevlm.export.graph.moved_codes import coded
from moevlm.export.model import CanonicalModel
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import CheckpointError, RequestError, UnsupportedModelError
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from tests.support.checkpoints import assert_same, canonical, names, refused, renamed, with_field
from tests.support.families.kimi_k25 import AS_PUBLISHED
from tests.support.published import FORMATS, floats
from tests.support.requests import assert_parity
from tests.support.tiny import TinyCheckpoint, edit_json, edit_tensors

MODEL = TinyCheckpoint("kimi_k25", text={"vocab_size": 96}, seed=76)
TARGETS = ("reference", "ort-cpu", "cpu:int8", "cpu:int4")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published; to be left as it is."""
    return MODEL.save(tmp_path_factory.mktemp("kimi") / "checkpoint")


def as_transformers_saves(name: str) -> str:
    for theirs, hub in AS_PUBLISHED.items():
        name = theirs + name.removeprefix(hub) if name.startswith(hub) and "proj." not in name[:18] else name
    return name


def test_names_are_those_of_the_hub(saved: Path) -> None:
    """moonshotai/Kimi-K2.5, model.safetensors.index.json."""
    assert names(saved) >= {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.mlp.gate_proj.weight",
        "language_model.model.layers.1.mlp.experts.0.gate_proj.weight",
        "language_model.model.layers.1.mlp.gate.e_score_correction_bias",
        "language_model.model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "mm_projector.pre_norm.weight",
        "mm_projector.proj.0.weight",
        "mm_projector.proj.2.bias",
        "vision_tower.encoder.blocks.0.mlp.fc0.weight",
        "vision_tower.encoder.blocks.0.norm0.weight",
        "vision_tower.encoder.blocks.0.wo.weight",
        "vision_tower.encoder.blocks.0.wqkv.bias",
        "vision_tower.encoder.final_layernorm.weight",
        "vision_tower.patch_embed.pos_emb.weight",
        "vision_tower.patch_embed.proj.weight",
    }


def test_a_checkpoint_that_transformers_saved_is_the_same(saved: Path, tmp_path: Path) -> None:
    directory = MODEL.save(tmp_path / "copy")
    found = renamed(directory, as_transformers_saves)
    assert "language_model.model.blocks.0.input_layernorm.weight" in names(found)
    assert "vision_tower.encoder.patch_embed.proj.weight" in names(found)
    assert_same(canonical(found), canonical(saved))


@pytest.mark.parametrize("there", [True, False])
def test_a_config_that_does_not_say_so_has_the_head_that_the_checkpoint_has(there: bool, tmp_path: Path) -> None:
    directory = MODEL.save(tmp_path / "copy")
    edit_json(directory / "config.json", lambda config: config.pop("tie_word_embeddings"))
    if not there:
        edit_tensors(directory, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    found = canonical(directory)
    assert np.array_equal(found["decoder.head"], found["decoder.embedding"]) == (not there)


def test_layers_that_predict_further_tokens_are_left_out_by_name(saved: Path, tmp_path: Path) -> None:
    directory = MODEL.save(tmp_path / "copy")
    name = "language_model.model.layers.61.enorm.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors["language_model.model.norm.weight"].clone()}))
    with Checkpoint.open(directory) as checkpoint:
        assert sum(CanonicalModel.of(checkpoint).left_out.values()) == 1
    assert_same(canonical(directory), canonical(saved))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("text_config.model_type", "deepseek_v2", 'text_config.model_type = "deepseek_v2" (supported: '),
        ("text_config.topk_method", "greedy", 'text_config.topk_method = "greedy" (supported: noaux_tc)'),
        ("text_config.hidden_act", "gelu", 'text_config.hidden_act = "gelu" (supported: silu)'),
        ("vision_config.hidden_act", "silu", 'vision_config.hidden_act = "silu"'),
        ("vision_config.merge_type", "sd2", 'vision_config.merge_type = "sd2"'),
        ("vision_config.num_attention_heads", 3, "vision_config.num_attention_heads = 3"),
        ("projection_hidden_size", 20, "projection_hidden_size = 20 (supported: 16)"),
        ("image_token_id", 96, "image_token_id = 96"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else None,
)
def test_value_that_is_not_supported_is_refused_by_name(path: str, value: Any, told: str, saved: Path) -> None:
    config = with_field(saved, path, value)
    refused(UnsupportedModelError, told, act=lambda: family_for(config).config(config))


def test_config_as_published_is_the_same_model(saved: Path) -> None:
    """moonshotai/Kimi-K2.5, config.json: names of its own code, and rope as before transformers 5."""
    config = json.loads((saved / "config.json").read_text())
    plain = family_for(config).config(config)
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")
    text |= {"model_type": "kimi_k2", "rope_theta": rope.pop("rope_theta"), "ep_size": 1, "seq_aux": True}
    text |= {"rope_scaling": rope | {"type": rope.pop("rope_type")}, "moe_layer_freq": 1, "aux_loss_alpha": 0.001}
    text |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "auto_map": {"AutoConfig": "x.Y"}}
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        vision[f"vt_{name}"] = vision.pop(name)
    for name in ("height", "width", "time"):
        vision[f"init_pos_emb_{name}"] = vision.pop(f"pos_emb_{name}")
    vision |= {"merge_type": "sd2_tpool", "pos_emb_type": "divided_fixed", "video_attn_type": "spatial_temporal"}
    vision |= {"mm_projector_type": "patchmerger", "projector_hidden_act": "gelu", "mm_hidden_size": 16}
    vision |= {"projector_ln_eps": config.pop("projection_layer_norm_eps"), "text_hidden_size": 32}
    config["media_placeholder_token_id"] = config.pop("image_token_id")
    for name in ("projection_hidden_size", "video_token_id"):
        del config[name]
    config |= {"ignore_index": -100, "use_unified_vision_chunk": True, "video_placeholder": "<|video|>"}
    assert family_for(config).config(config) == plain


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    directory = MODEL.save(tmp_path / "copy")
    edit_tensors(directory, lambda tensors: tensors.pop("vision_tower.encoder.blocks.1.wqkv.bias"))
    told = "the checkpoint lacks tensor model.vision_tower.encoder.blocks.1.wqkv.bias"
    refused(CheckpointError, told, act=lambda: canonical(directory))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """And its checkpoint."""
    folder = tmp_path_factory.mktemp("bundle")
    checkpoint = TinyCheckpoint("kimi_k25", side_files=True, seed=77).save(folder / "checkpoint")
    return build(checkpoint, folder / "tiny.moevlm", TARGETS), checkpoint


@pytest.fixture(scope="module")
def runtime(bundle: tuple[Bundle, Path]) -> Iterator[Runtime]:
    with load_runtime(bundle[0].directory, "cpu:int8", LoadOptions(threads=1)) as loaded:
        yield loaded


def test_every_target_and_its_requests_pass_parity(bundle: tuple[Bundle, Path]) -> None:
    assert assert_parity(*bundle, TARGETS) == (("images",) if find_spec("torchvision") is None else ())


def test_an_image_s_tokens_stand_inside_of_what_the_template_writes(runtime: Runtime) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)  # 3 x 4 tokens of 8 x 8 pixels
    image = {"type": "image", "image": Image.fromarray(pixels)}
    prompt = runtime.prompt([{"role": "user", "content": [image, {"type": "text", "text": "?"}, image]}])
    ids = prompt.ids.tolist()
    first, last = ids.index(runtime.model.image_token_id), len(ids) - ids[::-1].index(runtime.model.image_token_id)
    assert ids[first : first + 12] == ids[last - 12 : last] == [runtime.model.image_token_id] * 12
    assert prompt.image_tokens == 24
    np.testing.assert_array_equal(prompt.positions, [range(len(ids))] * 3)


def test_videos_are_refused_by_name(runtime: Runtime) -> None:
    with pytest.raises(RequestError, match=r'\.type = .?"?video.* \(allowed: image, '):
        runtime.prompt([{"role": "user", "content": [{"type": "video", "video": "file"}]}])


def test_tensorrt_rtx_builds_plans_of_the_decoder_and_of_the_tower(saved: Path, tmp_path: Path) -> None:
    bundle = build(saved, tmp_path / "b.moevlm", ["rtx:sm89"])
    engine, layers = bundle.manifest.engines["rtx:sm89:bf16"], len(bundle.manifest.model.layers)
    for plan, plugin, count in ((engine.decoder, "PagedAttention", layers), (engine.vision, "SegmentAttention", 2)):
        for profile in launches(bundle.path(plan).read_bytes()):
            assert [launch.plugin for launch in profile].count(plugin) == count


def test_published_integers_of_the_experts_are_read_and_stay_as_they_are(tmp_path: Path) -> None:
    """moonshotai/Kimi-K2.5: groups of 32, all else as it is, and the config inside of text_config."""
    left = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
    form = replace(
        FORMATS["int4-32"],
        config=FORMATS["int4-32"].config | {"ignore": left},
        path=("text_config", "quantization_config"),
    )
    source = floats("kimi_k25", tmp_path / "floats")
    form.publish(source, tmp_path / "published", tmp_path / "plain", lambda name: ".experts." in name)
    found = names(tmp_path / "published")
    assert "language_model.model.layers.1.mlp.experts.3.up_proj.weight_packed" in found
    assert "language_model.model.layers.1.mlp.shared_experts.up_proj.weight" in found
    assert_same(canonical(tmp_path / "published"), canonical(tmp_path / "plain"))
    with Checkpoint.open(tmp_path / "published") as checkpoint:
        model = CanonicalModel.of(checkpoint)
    for part in ("gate_up", "down"):
        kept = coded(model.decoder_weights[f"layers.1.feed_forward.{part}"])
        assert kept is not None
        assert (kept.form.kind, kept.form.group_size) == ("int4", 32)
