"""Tiny models of gemma4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.support.families.base import (
    END,
    IMAGE,
    SMALL,
    STOP,
    TEXT,
    VIDEO,
    VISION_END,
    VISION_START,
    Fields,
    TinyFamily,
)

if TYPE_CHECKING:
    import torch

SLIDING, FULL = "sliding_attention", "full_attention"
FIELDS: Fields = {
    "text": {key: TEXT[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings")}
    | {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "attention_k_eq_v": True,
        "sliding_window": 8,
        "use_bidirectional_attention": "vision",
        "intermediate_size": 40,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 4.0,
        "bos_token_id": None,
        "eos_token_id": [STOP, END],
        "pad_token_id": END,
    },
    "vision": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 300,
        "pooling_kernel_size": 2,
    },
    "top": {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "boi_token_id": VISION_START,
        "eoi_token_id": VISION_END,
        "audio_config": None,
    },
}


def values(name: str, normal: torch.Tensor) -> torch.Tensor | None:
    """Gains and factors around 1; of queries and keys, whose products have no other scale, around a half."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.5 + 0.1 * normal
    if name.endswith((".scale", ".per_expert_scale", ".layer_scalar", "std_scale")):
        return 1 + 0.2 * normal
    if name.endswith("embedding_projection.weight"):
        return normal / normal.shape[1] ** 0.5
    return None


def preprocessor(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "patch_size": vision["patch_size"],
        "pooling_kernel_size": vision["pooling_kernel_size"],
        "max_soft_tokens": 70,
    }


FAMILY = TinyFamily(
    FIELDS,
    "Gemma4Config",
    "Gemma4ForConditionalGeneration",
    "Gemma4ImageProcessor",
    configurations={
        "keys as values, bf16": dict(text=SMALL, dtype="bfloat16", seed=21),
        "own values, no softcap, as many heads, one expert": dict(
            text=SMALL
            | {
                "attention_k_eq_v": False,
                "final_logit_softcapping": None,
                "num_key_value_heads": 4,
                "top_k_experts": 1,
                "sliding_window": 5,
            },
            vision={"standardize": True},
            seed=22,
        ),
        "full layers in between, causal images, wide rope, untied head, biases": dict(
            text=SMALL
            | {
                "num_hidden_layers": 4,
                "layer_types": [FULL, SLIDING, SLIDING, FULL],
                "use_bidirectional_attention": None,
                "attention_bias": True,
                "num_global_key_value_heads": 2,
                "rope_parameters": {
                    SLIDING: {"rope_type": "default", "rope_theta": 1e3},
                    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.75, "rope_theta": 1e5},
                },
            },
            top={"tie_word_embeddings": False},
            seed=23,
        ),
        "one size of heads, full layers alone, pooling of 3": dict(
            text=SMALL | {"layer_types": [FULL] * 3, "head_dim": 32, "top_k_experts": 4},
            vision={"pooling_kernel_size": 3},
            seed=24,
        ),
        "dense": dict(text=SMALL | {"enable_moe_block": False}, seed=25),
    },
    values=values,
    preprocessor=preprocessor,
    image="<|image_pad|>",
    named_tokens={"image_token": "<|image_pad|>", "boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>"},
)
