"""config.json and tensors of Gemma 4 as they are published, and what is refused of them."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.config import GQAConfig, ModelConfig, MoEConfig
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from tests.support.checkpoints import canonical, refused
from tests.support.families.gemma4 import FULL, SLIDING
from tests.support.tiny import edit_json, edit_tensors

# google/gemma-4-26B-A4B-it, as transformers 5.5 wrote it.
TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": True,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2816,
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "intermediate_size": 2112,
    "layer_types": [*[SLIDING] * 5, FULL] * 5,
    "max_position_embeddings": 262144,
    "model_type": "gemma4_text",
    "moe_intermediate_size": 704,
    "num_attention_heads": 16,
    "num_experts": 128,
    "num_global_key_value_heads": 2,
    "num_hidden_layers": 30,
    "num_key_value_heads": 8,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "top_k_experts": 8,
    "use_bidirectional_attention": "vision",
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}
VISION: dict[str, Any] = {
    "_name_or_path": "",
    "architectures": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "chunk_size_feed_forward": 0,
    "default_output_length": 280,
    "dtype": "bfloat16",
    "global_head_dim": 72,
    "head_dim": 72,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_range": 0.02,
    "intermediate_size": 4304,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "max_position_embeddings": 131072,
    "model_type": "gemma4_vision",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "output_attentions": False,
    "output_hidden_states": False,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
    "problem_type": None,
    "return_dict": True,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": True,
    "use_clipped_linears": False,
}
PUBLISHED: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "audio_token_id": 258881,
    "boa_token_id": 256000,
    "boi_token_id": 255999,
    "dtype": "bfloat16",
    "eoa_token_id": 258883,
    "eoa_token_index": 258883,
    "eoi_token_id": 258882,
    "eos_token_id": [1, 106, 50],
    "image_token_id": 258880,
    "initializer_range": 0.02,
    "model_type": "gemma4",
    "text_config": TEXT,
    "tie_word_embeddings": True,
    "transformers_version": "5.5.0.dev0",
    "video_token_id": 258884,
    "vision_config": VISION,
    "vision_soft_tokens_per_image": 280,
}


def parse(**text: Any) -> ModelConfig:
    config = copy.deepcopy(PUBLISHED)
    for key, value in text.items():
        config["text_config"][key] = value
    return family_for(config).config(config)


def heads(mixer: GQAConfig) -> tuple[int, int, int]:
    return mixer.heads, mixer.kv_heads, mixer.head_dim


def test_published_config_is_understood_whole() -> None:
    config = parse()
    decoder = config.decoder
    local, full = decoder.layers[0].mixer, decoder.layers[5].mixer
    assert (heads(local), heads(full)) == ((16, 8, 256), (16, 2, 512))
    assert (local.window, full.window, local.scale, full.scale) == (1024, 0, 1.0, 1.0)
    assert (local.value_is_key, full.value_is_key, local.value_norm) == (False, True, True)
    assert (local.bidirectional_images, full.bidirectional_images) == (True, False)
    assert [i for i, layer in enumerate(decoder.layers) if not layer.mixer.window] == [5, 11, 17, 23, 29]
    assert [(rope.dim, rope.theta, len(rope.frequencies)) for rope in decoder.ropes] == [(256, 1e4, 0), (512, 1e6, 256)]
    assert np.count_nonzero(decoder.ropes[1].frequencies) == 64
    moe = decoder.layers[0].feed_forward
    assert isinstance(moe, MoEConfig)
    assert (moe.experts, moe.router.top_k, moe.width, moe.dense_width, moe.expert_scale) == (128, 8, 704, 2112, True)
    assert (decoder.logit_softcap, decoder.embedding_scale, decoder.tied_head) == (30.0, 2816**0.5, True)
    assert config.eos_token_ids == (1, 106, 50)


def test_heads_of_each_layer_as_transformers_5_24_writes_them() -> None:
    from transformers import Gemma4Config

    written = Gemma4Config(**copy.deepcopy(PUBLISHED)).to_dict()
    assert "global_head_dim" not in written["text_config"]
    assert family_for(written).config(written) == parse()
    own = written["text_config"]["per_layer_config"]
    own["11"] = {"head_dim": 128}
    refused(
        CheckpointError,
        "text_config.per_layer_config.11 = [128, 8] (allowed: heads like those of other layers of full_attention: "
        "[512, 2])",
        act=lambda: family_for(written).config(written),
    )


def test_last_layer_is_a_full_one_and_every_sixth_without_types() -> None:
    windows = [layer.mixer.window for layer in parse(layer_types=None, num_hidden_layers=8).decoder.layers]
    assert windows == [1024] * 5 + [0, 1024, 0]
    assert parse(layer_types=[SLIDING] * 30).decoder.layers[-1].mixer.window == 0


def rope(**full: Any) -> dict[str, Any]:
    return {"rope_parameters": {SLIDING: {"rope_theta": 1e4}, FULL: {"rope_theta": 1e6} | full}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ({"hidden_size_per_layer_input": None}, "text_config.hidden_size_per_layer_input = 256 (supported: 0)"),
        (
            {"layer_types": [SLIDING]},
            'layer_types = ["sliding_attention"] (supported: 30 times sliding_attention or full_attention)',
        ),
        (
            rope(rope_type="proportional", partial_rotary_factor=2),
            "partial_rotary_factor = 2.0 (allowed: a part of which 1 to 256 frequencies turn, here 512)",
        ),
        (
            {"head_dim": 7},
            "text_config.head_dim = 7 (allowed: an even number of rotating dimensions from 2 to 7, here 7)",
        ),
        ({"top_k_experts": 129}, "text_config.top_k_experts = 129 (allowed: 1 to the 128 experts not masked out)"),
        ({"moe_layer_indices": [1, 3]}, "unsupported field in config.json: text_config.moe_layer_indices = [1, 3]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(text: dict[str, Any], told: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=re.escape(told)):
        parse(**text)


def one_by_one(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        base = name.removesuffix(".gate_up_proj")
        gate, up = tensors.pop(name).chunk(2, 1)
        for part, experts in (("gate", gate), ("up", up), ("down", tensors.pop(f"{base}.down_proj"))):
            tensors |= {f"{base}.{e}.{part}_proj.weight": expert for e, expert in enumerate(experts)}


def transposed(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "experts." in name:
            tensors[name] = tensors[name].mT


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[re.sub(old, new, name)] = tensors.pop(name)

    return change


LAYOUTS = {
    "experts one by one": one_by_one,
    "experts transposed": transposed,
    "the base model alone": renamed("^model[.]", ""),
    "model inside the language model": renamed("language_model[.]", "language_model.model."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_on_disk_are_one_model(
    layout: str, saved: dict[str, Path], save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(model_type="gemma4")
    before = Checkpoint.open(directory).tensors
    edit_tensors(directory, LAYOUTS[layout])
    after = Checkpoint.open(directory).tensors
    assert {name: weight.shape for name, weight in before.items()} != {n: weight.shape for n, weight in after.items()}
    ours, theirs = canonical(directory), canonical(saved["gemma4"])
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_each_weight_has_the_values_stored_under_its_name(saved: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    tensors, weights = load_file(saved["gemma4"] / "model.safetensors"), canonical(saved["gemma4"])
    for ours, theirs in {
        "attention_norm.weight": "input_layernorm.weight",
        "attention_post_norm.weight": "post_attention_layernorm.weight",
        "feed_forward.mlp_norm.weight": "pre_feedforward_layernorm.weight",
        "feed_forward.mlp_post_norm.weight": "post_feedforward_layernorm_1.weight",
        "feed_forward.experts_norm.weight": "pre_feedforward_layernorm_2.weight",
        "feed_forward.experts_post_norm.weight": "post_feedforward_layernorm_2.weight",
        "feed_forward_post_norm.weight": "post_feedforward_layernorm.weight",
        "feed_forward.expert_scale": "router.per_expert_scale",
        "scale": "layer_scalar",
    }.items():
        stored = tensors[f"model.language_model.layers.1.{theirs}"].numpy()
        np.testing.assert_array_equal(weights[f"decoder.layers.1.{ours}"], stored, err_msg=ours)
    scale = tensors["model.language_model.layers.1.router.scale"].numpy()
    np.testing.assert_allclose(weights["decoder.layers.1.feed_forward.router_norm.weight"], scale / 32**0.5, rtol=1e-6)


def test_audio_is_left_out_and_counted(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type="gemma4")
    audio = {"model.audio_tower.layers.0.norm_out.weight": 8, "model.embed_audio.embedding_projection.weight": 9}
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.zeros(n) for name, n in audio.items()}))
    edit_json(directory / "config.json", lambda config: config.update(audio_config={"hidden_size": 8}))
    with Checkpoint.open(directory) as checkpoint:
        assert CanonicalModel.of(checkpoint).left_out == {"audio_tower": 1, "embed_audio": 1}


def test_tensors_that_are_missing_or_too_many_are_named(save_checkpoint: Callable[..., Path]) -> None:
    directory, layer = save_checkpoint(model_type="gemma4"), "model.language_model.layers.2."
    extra = f"{layer}self_attn.v_proj.weight"  # a layer whose values are its keys
    edit_tensors(directory, lambda tensors: tensors.update({extra: torch.zeros(32, 32)}))
    refused(
        CheckpointError,
        "without a place in the model: 1 tensor of the checkpoint",
        extra,
        act=lambda: canonical(directory),
    )
    edit_tensors(directory, lambda tensors: [tensors.pop(name) for name in (extra, f"{layer}layer_scalar")])
    refused(CheckpointError, f"lacks tensor {layer}layer_scalar", act=lambda: canonical(directory))
