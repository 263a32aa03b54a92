"""ERNIE 4.5 VL: where its tensors lie, what is refused, experts for text and for images, requests with images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.plan_launches import launches
from moevlm.export.backends.tensorrt.passes.native_moe import NativeMoE
from moevlm.export.build import build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.dry_run import dry_run
from moevlm.export.families import family_for
from moevlm.export.graph.weights import Constant
from moevlm.export.model import CanonicalModel, load
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BuildError, CheckpointError, RequestError, UnsupportedModelError
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from tests.support.checkpoints import assert_same, canonical, names, refused, renamed, with_field
from tests.support.fakes.gpu import gpu_bundle
from tests.support.gpu_steps import assert_steps_are_those_of_reference
from tests.support.published import FORMATS, floats
from tests.support.requests import assert_parity, picture
from tests.support.tiny import TinyCheckpoint, edit_tensors

MODEL = TinyCheckpoint("ernie4_5_vl_moe", text={"vocab_size": 96}, seed=86)
TARGETS = ("reference", "ort-cpu", "cpu:int8", "cpu:int4")
LAYER = "model.layers.1.mlp."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published; to be left as it is."""
    return MODEL.save(tmp_path_factory.mktemp("ernie") / "checkpoint")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """One's own."""
    return MODEL.save(tmp_path / "copy")


def test_names_are_those_of_the_hub(saved: Path) -> None:
    """baidu/ERNIE-4.5-VL-28B-A3B-PT, as transformers reads it: `conversion_mapping.py`."""
    found = names(saved)
    assert found >= {
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        f"{LAYER}experts.0.gate_proj.weight",
        f"{LAYER}experts.15.down_proj.weight",
        f"{LAYER}gate.weight",
        f"{LAYER}gate.weight_1",
        f"{LAYER}moe_statics.e_score_correction_bias",
        f"{LAYER}shared_experts.up_proj.weight",
        "model.norm.weight",
        "model.resampler_model.after_norm.weight",
        "model.resampler_model.spatial_linear.3.bias",
        "model.resampler_model.temporal_linear.0.weight",
        "model.vision_model.blocks.0.attn.qkv.bias",
        "model.vision_model.ln.weight",
    }
    assert f"{LAYER}experts.16.up_proj.weight" not in found


def test_a_tower_beside_the_model_is_the_same(saved: Path, copy: Path) -> None:
    found = renamed(copy, lambda name: name.replace("model.vision_model.", "vision_model."))
    assert "vision_model.ln.weight" in names(found)
    assert_same(canonical(found), canonical(saved))


def test_experts_for_images_come_after_those_for_text(saved: Path) -> None:
    found, tensors = canonical(saved), {}
    with Checkpoint.open(saved) as checkpoint:
        for name in (f"{LAYER}experts.9.down_proj.weight", f"{LAYER}gate.weight_1", f"{LAYER}gate.weight"):
            weight = checkpoint.tensors[name]
            tensors[name.removeprefix(LAYER)] = weight.rows(0, weight.shape[0])
    ours = "decoder.layers.1.feed_forward."
    np.testing.assert_array_equal(found[f"{ours}images.down"][1], tensors["experts.9.down_proj.weight"])
    np.testing.assert_array_equal(found[f"{ours}images.router.weight"], tensors["gate.weight_1"].T)
    np.testing.assert_array_equal(found[f"{ours}router.weight"], tensors["gate.weight"].T)


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}experts.12.up_proj.weight",
        f"{LAYER}gate.weight_1",
        f"{LAYER}moe_statics.e_score_correction_bias",
        "model.resampler_model.temporal_linear.2.bias",
        "model.vision_model.blocks.1.mlp.fc2.weight",
    ],
)
def test_missing_tensor_is_named(name: str, copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop(name))
    refused(CheckpointError, f"the checkpoint lacks tensor {name}", act=lambda: canonical(copy))


def test_tensor_of_another_shape_is_named(copy: Path) -> None:
    name = f"{LAYER}moe_statics.e_score_correction_bias"
    edit_tensors(copy, lambda tensors: tensors.update({name: tensors[name][:1].clone()}))
    told = f"tensor {name} has shape [1, 8], the config asks for [2, 8]"
    refused(CheckpointError, told, act=lambda: canonical(copy))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("text_config.hidden_act", "gelu", 'text_config.hidden_act = "gelu" (supported: silu)'),
        ("text_config.use_bias", True, "text_config.use_bias = true (supported: false)"),
        ("text_config.moe_norm_min", 0.5, "text_config.moe_norm_min = 0.5 (supported: 1e-12)"),
        ("text_config.moe_k", 9, "text_config.moe_k = 9"),
        ("text_config.mlp_layer_types", ["dense", "wide"], 'text_config.mlp_layer_types = ["dense", "wide"]'),
        ("text_config.rope_parameters.rope_type", "yarn", 'rope_type = "yarn" (supported: default)'),
        ("vision_config.hidden_act", "silu", 'vision_config.hidden_act = "silu"'),
        ("vision_config.num_heads", 3, "vision_config.num_heads = 3"),
        ("vision_config.temporal_merge_size", 3, "vision_config.temporal_merge_size = 3 (supported: 2)"),
        ("image_token_id", 96, "image_token_id = 96"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else None,
)
def test_value_that_is_not_supported_is_refused_by_name(path: str, value: Any, told: str, saved: Path) -> None:
    config = with_field(saved, path, value)
    refused(UnsupportedModelError, told, act=lambda: family_for(config).config(config))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("text_config.moe_intermediate_size", [24], "[24] (allowed: two widths, for text and for images)"),
        ("text_config.moe_intermediate_size", 24, "text_config.moe_intermediate_size = 24"),
        (
            "text_config.rope_parameters.mrope_section",
            [2, 3, 3],
            "mrope_section = [2, 3, 3] (allowed: height, width and time, ",
        ),
        ("text_config.rope_parameters.mrope_section", [3, 3, 3], "the first two alike, that add up to 8)"),
    ],
)
def test_value_that_cannot_be_is_refused_by_name(path: str, value: Any, told: str, saved: Path) -> None:
    config = with_field(saved, path, value)
    refused(CheckpointError, told, act=lambda: family_for(config).config(config))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """And its checkpoint."""
    folder = tmp_path_factory.mktemp("bundle")
    checkpoint = TinyCheckpoint("ernie4_5_vl_moe", side_files=True, seed=87).save(folder / "checkpoint")
    return build(checkpoint, folder / "tiny.moevlm", TARGETS), checkpoint


@pytest.fixture(scope="module")
def runtime(bundle: tuple[Bundle, Path]) -> Iterator[Runtime]:
    with load_runtime(bundle[0].directory, "cpu:int8", LoadOptions(threads=1)) as loaded:
        yield loaded


def test_every_target_and_its_requests_pass_parity(bundle: tuple[Bundle, Path]) -> None:
    assert assert_parity(*bundle, TARGETS) == ()


def test_positions_are_those_of_transformers(runtime: Runtime) -> None:
    """Two images of 3 x 4 and of 2 x 2 tokens, of 8 x 8 pixels each."""
    from transformers import Ernie4_5_VLMoeModel

    with torch.device("meta"):
        model = Ernie4_5_VLMoeModel(TinyCheckpoint("ernie4_5_vl_moe").config())
    content = [picture(32, 24), {"type": "text", "text": "?"}, picture(16, 16)]
    prompt = runtime.prompt([{"role": "user", "content": content}])
    ids = torch.from_numpy(prompt.ids)[None]
    types = (ids == runtime.model.image_token_id).int()
    grids = torch.tensor([[1, 6, 8], [1, 4, 4]])
    expected, _ = model.get_rope_index(ids, types, grids)
    assert prompt.image_tokens == 16
    np.testing.assert_array_equal(prompt.positions, expected[:, 0])


def test_videos_are_refused_by_name(runtime: Runtime) -> None:
    with pytest.raises(RequestError, match=r'\.type = .?"?video.* \(allowed: image, '):
        runtime.prompt([{"role": "user", "content": [{"type": "video", "video": "file"}]}])


@pytest.mark.parametrize("kind", ["text", "images"])
def test_tokens_of_one_kind_never_read_the_experts_of_the_other(kind: str, saved: Path) -> None:
    """These are not numbers here, and the logits of tokens of the other kind are."""
    with Checkpoint.open(saved) as checkpoint:
        model = CanonicalModel.of(checkpoint)
        weights = dict(model.decoder_weights)
        for part in ("gate_up", "down"):
            name = f"layers.1.feed_forward.{'images.' if kind == 'text' else ''}{part}"
            weights[name] = Constant(np.full(weights[name].shape, np.nan, np.float32))
        _, decoder = replace(model, decoder_weights=weights).towers()
        load(decoder, weights)
    block, image = decoder.layers[1].feed_forward, torch.tensor([[kind == "images"]] * 3)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 32), np.float32))
    assert torch.isfinite(block(x, image)).all()
    assert torch.isnan(block(x, ~image)).all()


def test_begin_and_end_of_an_image_go_to_its_experts(saved: Path) -> None:
    """transformers 5.24, Ernie4_5_VLMoeProcessor.create_moe_mm_token_type_ids."""
    with Checkpoint.open(saved) as checkpoint:
        config = CanonicalModel.of(checkpoint).config
    raw = checkpoint.config
    own = {raw[f"image_{part}token_id"] for part in ("", "start_", "end_")}
    assert set(config.decoder.image_ids) == own


def test_active_parameters_and_costs_of_a_token_leave_out_experts_for_images(bundle: tuple[Bundle, Path]) -> None:
    engine, model = bundle[0].manifest.engines["reference"], bundle[0].manifest.model
    matrices = 3 * 32 * np.array([24, 16])  # values of an expert, for text and for images, in the only sparse layer
    assert engine.cost is not None
    assert (engine.cost.expert_bytes, engine.cost.image_expert_bytes) == tuple(4 * matrices)
    router, bias = 8 * 32, 8
    assert model.parameters - model.active_parameters == 6 * matrices[0] + 8 * matrices[1] + router + bias


def test_a_dry_run_plans_what_the_build_stores(bundle: tuple[Bundle, Path]) -> None:
    plan = dry_run(bundle[1], TARGETS)
    assert plan.model == bundle[0].manifest.model
    for target in plan.targets:
        assert target.engine is not None
        assert target.engine.cost == bundle[0].manifest.engines[target.name].cost
        data = [path for path in bundle[0].engine_files(target.name) if path.endswith(".data")]
        assert target.bytes == sum(bundle[0].manifest.files[path].size for path in data)


def test_steps_on_a_gpu_send_tokens_of_each_kind_to_their_experts(bundle: tuple[Bundle, Path], tmp_path: Path) -> None:
    """On a fake GPU that evaluates the canonical graphs."""
    contents: list[list[dict[str, Any]]] = [[{"type": "text", "text": "hi"}], [picture(28, 20), picture(28, 9)]]
    directory = gpu_bundle(bundle[0].directory, tmp_path)
    assert_steps_are_those_of_reference(directory, [[{"role": "user", "content": each}] for each in contents], tmp_path)


def test_tensorrt_rtx_builds_plans_of_the_decoder_and_of_the_tower(saved: Path, tmp_path: Path) -> None:
    bundle = build(saved, tmp_path / "b.moevlm", ["rtx:sm89"])
    engine = bundle.manifest.engines["rtx:sm89:bf16"]
    for profile in launches(bundle.path(engine.decoder).read_bytes()):
        plugins = [launch.plugin for launch in profile]
        assert [plugins.count(name) for name in ("PagedAttention", "MoERouter", "MoEExperts")] == [2, 2, 2]
    for profile in launches(bundle.path(engine.vision).read_bytes()):
        assert [launch.plugin for launch in profile].count("SegmentAttention") == 2


def test_tensorrt_s_own_layer_for_experts_is_refused_by_name(saved: Path) -> None:
    with Checkpoint.open(saved) as checkpoint:
        graph = CanonicalModel.of(checkpoint).graphs["decoder"]
    told = "TensorRT's own MoE cannot compute ", ": some tokens go to no expert of layers.1.feed_forward.gate_up"
    refused(BuildError, *told, act=lambda: NativeMoE().apply(graph))


def test_integers_of_the_experts_of_both_kinds_are_read(tmp_path: Path) -> None:
    form = FORMATS["int4-32"]
    source = floats("ernie4_5_vl_moe", tmp_path / "floats")
    form.publish(source, tmp_path / "published", tmp_path / "plain", lambda name: ".experts." in name)
    assert f"{LAYER}experts.12.up_proj.weight_packed" in names(tmp_path / "published")
    assert_same(canonical(tmp_path / "published"), canonical(tmp_path / "plain"))
