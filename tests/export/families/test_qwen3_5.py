"""Qwen3.5 without experts: its published config, and what only its sibling with experts has."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from tests.support.checkpoints import canonical, refused
from tests.support.tiny import edit_tensors


def test_config_of_qwen3_6_27b_as_published_is_understood() -> None:
    text = {
        **{"model_type": "qwen3_5_text", "dtype": "bfloat16", "initializer_range": 0.02, "use_cache": True},
        **{"attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "output_gate_type": "swish"},
        **{"bos_token_id": 248044, "eos_token_id": 248044, "pad_token_id": None, "vocab_size": 248320},
        **{"full_attention_interval": 4, "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 17408},
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16,
        **{"head_dim": 256, "num_attention_heads": 24, "num_key_value_heads": 4, "hidden_act": "silu"},
        **{"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 48, "mamba_ssm_dtype": "float32"},
        **{"max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "partial_rotary_factor": 0.25},
        **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "tie_word_embeddings": False},
        "rope_parameters": {
            **{"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default"},
            **{"rope_theta": 10000000, "partial_rotary_factor": 0.25},
        },
    }
    vision = {
        **{"model_type": "qwen3_5", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16},
        **{"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2},
        **{"temporal_patch_size": 2, "num_position_embeddings": 2304, "out_hidden_size": 5120},
        **{"deepstack_visual_indexes": [], "initializer_range": 0.02},
    }
    top = {
        **{"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "tie_word_embeddings": False},
        **{"image_token_id": 248056, "video_token_id": 248057},
        **{"vision_start_token_id": 248053, "vision_end_token_id": 248054},
    }
    config = family_for(top).config({**top, "text_config": text, "vision_config": vision})
    assert [state.shape for state in config.decoder.layers[0].mixer.states(0)] == [(3, 10240), (48, 128, 128)]
    assert {layer.feed_forward.width for layer in config.decoder.layers} == {17408}
    assert config.moe == {}


@pytest.mark.parametrize("field", ["num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"])
def test_fields_of_experts_are_refused_by_name(field: str, save_checkpoint: Callable[..., Path]) -> None:
    config = json.loads((save_checkpoint(model_type="qwen3_5") / "config.json").read_text())
    config["text_config"][field] = 8
    told = f"unsupported field in config.json: text_config.{field} = 8"
    refused(UnsupportedModelError, told, act=lambda: family_for(config).config(config))


def test_model_without_any_attention_is_refused_by_name(save_checkpoint: Callable[..., Path]) -> None:
    config = json.loads((save_checkpoint(model_type="qwen3_5") / "config.json").read_text())
    config["text_config"]["layer_types"] = ["linear_attention"] * 2
    told = 'text_config.layer_types = ["linear_attention", "linear_attention"] (allowed: one full_attention or more)'
    refused(CheckpointError, told, act=lambda: family_for(config).config(config))


def test_layers_that_predict_another_token_are_left_out_and_others_are_not(
    save_checkpoint: Callable[..., Path],
) -> None:
    directory = save_checkpoint(model_type="qwen3_5")
    edit_tensors(directory, lambda tensors: tensors.update({"mtp.layers.0.mlp.up_proj.weight": torch.zeros(4, 4)}))
    with Checkpoint.open(directory) as checkpoint:
        assert CanonicalModel.of(checkpoint).left_out == {"mtp": 1}
    extra = "model.language_model.layers.0.mlp.shared_expert_gate.weight"
    edit_tensors(directory, lambda tensors: tensors.update({extra: torch.zeros(1, 32)}))
    refused(CheckpointError, "without a place in the model: 1 tensor", extra, act=lambda: canonical(directory))
