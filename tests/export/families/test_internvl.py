"""InternVL: where its tensors lie, float and in codes, what is refused, and requests with tiled images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.build import build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.run import check_parity
from moevlm.runtime.backends.tensorrt.plan_header import HEADER_BYTES, plan_header
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from tests.support.bundles import edit_manifest
from tests.support.checkpoints import assert_same, canonical, refused, with_field
from tests.support.fakes.gpu import TARGET, gpu_bundle
from tests.support.families.internvl import GPT_OSS
from tests.support.gpu_steps import assert_steps_are_those_of_reference
from tests.support.published import FORMATS
from tests.support.requests import assert_alone_as_together, assert_parity, picture
from tests.support.tiny import TinyCheckpoint

TARGETS = ("reference", "ort-cpu", "cpu:int8", "cpu:int4")
KINDS: dict[str, dict[str, Any]] = {"qwen3_moe": {}, "gpt_oss": GPT_OSS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be left as it is."""
    return TinyCheckpoint("internvl", text={"vocab_size": 96}, seed=76).save(tmp_path_factory.mktemp("internvl") / "it")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["awq-32", "awq-128", "fp8-blocks"])
def test_published_codes_are_read_as_their_definition_says(name: str, tmp_path: Path) -> None:
    text = {"vocab_size": 96, "hidden_size": 256, "moe_intermediate_size": 384, "num_experts": 4, "head_dim": 32}
    checkpoint = TinyCheckpoint("internvl", text=text, seed=77).save(tmp_path / "float")
    quantized = FORMATS[name].publish(checkpoint, tmp_path / "quantized", tmp_path / "plain")
    assert_same(canonical(quantized), canonical(tmp_path / "plain"))
    with Checkpoint.open(quantized) as opened:
        model = CanonicalModel.of(opened)
    codes = sum(number for kind, number in model.stored_as.items() if kind != "float32")
    assert codes == 2 * (4 + 4 * 3)  # each projection of both layers
    assert len(model.vision_weights) > 20


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("text_config.model_type", "qwen2", 'text_config.model_type = "qwen2" (supported: gpt_oss, qwen3_moe)'),
        ("text_config.hidden_act", "gelu", 'text_config.hidden_act = "gelu" (supported: silu)'),
        ("image_seq_length", 256, "image_seq_length = 256 (supported: 4)"),
        ("vision_feature_layer", -2, "vision_feature_layer = -2 (supported: -1, 2)"),
        ("vision_feature_select_strategy", "full", 'vision_feature_select_strategy = "full" (supported: default)'),
        ("downsample_ratio", 0.3, "downsample_ratio = 0.3 (supported: "),
        ("vision_config.hidden_act", "relu", 'vision_config.hidden_act = "relu"'),
        ("vision_config.num_attention_heads", 3, "vision_config.num_attention_heads = 3"),
        ("text_config.num_experts_per_tok", 9, "text_config.num_experts_per_tok = 9"),
        ("image_token_id", 96, "image_token_id = 96"),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" not in value else None,
)
def test_value_that_is_not_supported_is_refused_by_name(path: str, value: Any, told: str, saved: Path) -> None:
    config = with_field(saved, path, value)
    refused(UnsupportedModelError, told, act=lambda: family_for(config).config(config))


def test_a_tokenizer_without_the_tokens_of_images_is_refused_by_their_name(tmp_path: Path) -> None:
    directory = TinyCheckpoint("internvl", side_files=True).save(tmp_path / "checkpoint")
    (directory / "tokenizer_config.json").unlink()  # which would add it
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text.replace("</img>", "</other>"))
    refused(CheckpointError, "</img>", act=lambda: build(directory, tmp_path / "bundle", ["reference"]))


@pytest.fixture(scope="module", params=KINDS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """And its checkpoint."""
    folder = tmp_path_factory.mktemp("bundle")
    model = TinyCheckpoint("internvl", text=KINDS[request.param], side_files=True, seed=78)
    checkpoint = model.save(folder / "checkpoint")
    return build(checkpoint, folder / "tiny.moevlm", TARGETS), checkpoint


def test_every_target_and_its_requests_pass_parity(bundle: tuple[Bundle, Path]) -> None:
    assert assert_parity(*bundle, TARGETS) == ()


def test_tiles_and_overview_stand_between_the_marks_of_an_image(bundle: tuple[Bundle, Path]) -> None:
    """As transformers' InternVLProcessor writes it: <img>, all tokens of all tiles and of the overview, </img>."""
    with load_runtime(bundle[0].directory, "cpu:int8", LoadOptions(threads=1)) as runtime:
        wide, small = picture(48, 32), picture(16, 16)
        messages = [{"role": "user", "content": [wide, {"type": "text", "text": "?"}, small]}]
        prompt = runtime.prompt(messages)
        (begin,), (end,) = runtime.model.image_marks.begin, runtime.model.image_marks.end
        token, ids = runtime.model.image_token_id, prompt.ids.tolist()
        first = ids.index(begin)
        whole = [begin, *[token] * (7 * 4), end]  # 2 x 3 tiles and an overview
        assert ids[first : first + 30] == whole
        assert ids[first + 31 : first + 37] == [begin, *[token] * 4, end]
        assert prompt.image_tokens == 32
        assert runtime.prompt(messages, max_image_tokens=12).image_tokens == 4 * 3 + 4  # 1 x 2 tiles and an overview
        np.testing.assert_array_equal(prompt.positions, [range(len(ids))] * 3)
        assert_alone_as_together(runtime, prompt)


def test_steps_on_a_gpu_are_given_whole_tiles(bundle: tuple[Bundle, Path], tmp_path: Path) -> None:
    """On a fake GPU that evaluates the canonical graphs, with images that no call of the tower takes at once."""
    parts: list[list[dict[str, Any]]] = [[picture(48, 32), picture(16, 16)], [picture(32, 48)], []]
    requests = [[{"role": "user", "content": [*images, {"type": "text", "text": "is?"}]}] for images in parts]
    directory = gpu_bundle(bundle[0].directory, tmp_path)
    edit_manifest(directory, lambda manifest: manifest["engines"][TARGET]["tensorrt"].update(max_patches=3 * 16))
    assert_steps_are_those_of_reference(directory, requests, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_tensorrt_rtx_builds_plans_of_its_tower_and_its_decoder(kind: str, tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint("internvl", text=KINDS[kind], side_files=True).save(tmp_path / "checkpoint")
    built = build(checkpoint, tmp_path / "tiny.moevlm", ["rtx:sm89"])
    (engine,) = built.manifest.engines.values()
    for plan in (engine.vision, engine.decoder):
        data = built.path(plan).read_bytes()
        found = plan_header(data[:HEADER_BYTES])
        assert found is not None
        assert (found.product, found.sms, found.length) == ("tensorrt_rtx", (89,), len(data))
    assert engine.tensorrt is not None
    assert engine.tensorrt.max_patches % 16 == 0  # whole tiles


# (hidden, layers, heads, key heads, experts, width of an expert), and vision_config
SIZES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "30B-A3B": (
        (2048, 48, 32, 4, 128, 768),
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        | {"norm_type": "layer_norm", "attention_bias": True, "use_qk_norm": False},
    ),
    "241B-A28B": (
        (4096, 94, 64, 4, 128, 1536),
        {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800}
        | {"norm_type": "rms_norm", "attention_bias": False, "use_qk_norm": True},
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_config_of_internvl3_5_is_understood(name: str) -> None:
    """Its sizes, with the fields that its trainer and older releases of transformers left in it."""
    (hidden, layers, heads, kv_heads, experts, width), tower = SIZES[name]
    text = {
        **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "torch_dtype": "bfloat16"},
        **{"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 3 * hidden, "vocab_size": 151936},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128, "hidden_act": "silu"},
        **{"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": width, "norm_topk_prob": True},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "attention_bias": False},
        **{"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None},
        **{"sliding_window": None, "use_sliding_window": False, "max_window_layers": layers, "use_cache": False},
        **{"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": None, "tie_word_embeddings": False},
        **{"debug": False, "ep_size": 1, "micro_forward": False, "skip_checkpoint": False, "use_deepep": False},
    }
    vision = tower | {
        **{"model_type": "internvl_vision", "image_size": [448, 448], "patch_size": [14, 14], "num_channels": 3},
        **{"hidden_act": "gelu", "layer_norm_eps": 1e-6, "layer_scale_init_value": 0.1, "use_mean_pooling": True},
        **{"attention_dropout": 0.0, "hidden_dropout_prob": 0.0, "projection_dropout": 0.0, "use_mask_token": False},
        **{"use_absolute_position_embeddings": True, "architectures": ["InternVisionModel"]},
    }
    top = {
        **{"model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"], "image_token_id": 151671},
        **{"image_seq_length": 256, "downsample_ratio": 0.5, "projector_hidden_act": "gelu"},
        **{"vision_feature_layer": -1, "vision_feature_select_strategy": "default", "torch_dtype": "bfloat16"},
    }
    values = top | {"text_config": text, "vision_config": vision}
    config = family_for(values).config(values)
    assert {(moe.experts, moe.router.top_k, moe.width) for moe in config.moe.values()} == {(experts, 8, width)}
    assert (config.eos_token_ids, config.vision.metadata().tokens((32, 32))) == ((151645,), 256)
    assert config.mark_texts == {"begin": "<img>", "end": "</img>"}


@pytest.mark.parametrize("name", ["awq-128", "fp8-blocks"])
def test_published_codes_pass_parity_with_transformers_on_their_values(name: str, tmp_path: Path) -> None:
    text = {"vocab_size": 96, "hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4, "head_dim": 32}
    checkpoint = TinyCheckpoint("internvl", text=text, seed=79).save(tmp_path / "float")
    quantized = FORMATS[name].publish(checkpoint, tmp_path / "quantized", tmp_path / "plain")
    bundle = build(quantized, tmp_path / "tiny.moevlm", ["reference", "cpu:int8", "cpu:int4"], group_size=128)
    report = check_parity(bundle.directory, quantized, quick=True)
    assert [check for check in report.checks if not check.passed] == []
    kept = "kept" in str(bundle.manifest.engines["cpu:int4"].recoded)
    assert kept == (name == "awq-128")
