"""Tiny models of gpt_oss, and their experts as they are published: in MXFP4."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.families.base import SMALL, TEXT, Fields, TinyFamily

if TYPE_CHECKING:
    import torch

SLIDING, FULL = "sliding_attention", "full_attention"
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# quantization_config of openai/gpt-oss-20b
QUANTIZED = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "truncate": False}
FIELDS: Fields = {
    "text": {key: value for key, value in TEXT.items() if key != "moe_intermediate_size"}
    | {
        "num_local_experts": 8,
        "intermediate_size": 24,
        "sliding_window": 8,
        "rope_parameters": YARN | {"original_max_position_embeddings": 64},
    },
    "vision": {},
    "top": {},
}


def values(name: str, normal: torch.Tensor) -> torch.Tensor | None:
    """Sinks as large as scores; gates and ups of which the limits of the configurations clamp some."""
    return normal if name.endswith("sinks") else None


def publish(plain: Path, directory: Path) -> Path:
    """A checkpoint of floats as one with experts in MXFP4, whose blocks lie the other way round."""
    from tests.support.quantized import mxfp4
    from tests.support.tiny import edit_json, edit_tensors

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(EXPERTS)]:
            parts, _ = mxfp4("_blocks", "_scales")(tensors.pop(name).mT.contiguous().numpy())
            tensors |= {name + ending: part for ending, part in parts.items()}

    shutil.copytree(plain, directory)
    edit_tensors(directory, change)
    edit_json(directory / "config.json", lambda config: config.update(quantization_config=QUANTIZED))
    return directory


FAMILY = TinyFamily(
    FIELDS,
    "GptOssConfig",
    "GptOssForCausalLM",
    "",
    configurations={
        "as published, bf16": dict(text=SMALL | {"num_hidden_layers": 3}, dtype="bfloat16", seed=71),
        "no biases in attention, one kv head, full layers first": dict(
            text=SMALL
            | {
                "attention_bias": False,
                "num_key_value_heads": 1,
                "num_hidden_layers": 3,
                "layer_types": [FULL, FULL, SLIDING],
            },
            seed=72,
        ),
        "one expert, whole steps of yarn, most of it clamped": dict(
            text=SMALL
            | {
                "num_experts_per_tok": 1,
                "rope_parameters": YARN | {"original_max_position_embeddings": 32, "truncate": True, "factor": 16.0},
                "swiglu_limit": 0.5,
                "swiglu_alpha": 1.1,
            },
            seed=73,
        ),
        "all experts, square ones, plain rope, tied head": dict(
            text=SMALL
            | {
                "num_experts_per_tok": 8,
                "intermediate_size": 32,
                "sliding_window": 5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            },
            top={"tie_word_embeddings": True},
            seed=74,
        ),
    },
    values=values,
    image="",
)
