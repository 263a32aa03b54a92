"""Tiny models of aria."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.support.families.base import IMAGE, SMALL, TEXT, Fields, TinyFamily

if TYPE_CHECKING:
    import torch

FIELDS: Fields = {
    "text": {
        name: value for name, value in TEXT.items() if name not in ("moe_intermediate_size", "num_experts_per_tok")
    }
    | {
        "model_type": "aria_text",
        "intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_topk": 2,
        "moe_num_shared_experts": 2,
    },
    "vision": {
        "model_type": "idefics3_vision",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 980,
        "patch_size": 140,
    },
    "top": {
        "image_token_index": IMAGE,
        "projector_patch_to_query_dict": {"16": 4, "49": 6},
        "tie_word_embeddings": False,
    },
}


def values(name: str, normal: torch.Tensor) -> torch.Tensor | None:
    """Experts [E, in, out] by their inputs; positions like patches."""
    if ".experts." in name:
        return normal / normal.shape[1] ** 0.5
    return 0.5 * normal if "position_embedding" in name else None


def preprocessor(vision: Mapping[str, Any]) -> dict[str, Any]:
    del vision
    return {"max_image_size": 980, "min_image_size": 336, "split_image": False}


FAMILY = TinyFamily(
    FIELDS,
    "AriaConfig",
    "AriaForConditionalGeneration",
    "AriaImageProcessor",
    configurations={
        "as published, bf16": dict(text=SMALL, dtype="bfloat16", seed=81),
        "tied head, biases, one shared expert, positions for half the image": dict(
            text=SMALL | {"attention_bias": True, "moe_num_shared_experts": 1, "num_hidden_layers": 3},
            vision={"image_size": 420, "num_attention_heads": 1},
            top={"tie_word_embeddings": True},
            seed=82,
        ),
        "fewer queries than those of larger images, another base, one expert": dict(
            text=SMALL | {"moe_topk": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
            vision={"patch_size": 245, "hidden_act": "gelu", "layer_norm_eps": 1e-2},
            seed=83,
        ),
        "six of 64 experts that are square in gates and ups, llama3, as many heads of keys, fp16, shards": dict(
            text=SMALL
            | {"intermediate_size": 16, "moe_num_experts": 64, "moe_topk": 6, "num_key_value_heads": 4}
            | {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 16.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 1.0,
                    "original_max_position_embeddings": 64,
                }
            },
            vision={"num_hidden_layers": 3},
            top={"vision_feature_layer": 3},
            dtype="float16",
            shard_size="20KB",
            seed=84,
        ),
        "square experts, one head of keys, wide heads": dict(
            text=SMALL | {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 32}, seed=85
        ),
    },
    values=values,
    preprocessor=preprocessor,
    image="<fim_prefix><|img|><fim_suffix>",
    renamed={"<|image_pad|>": "<|img|>", "<|vision_start|>": "<fim_prefix>", "<|vision_end|>": "<fim_suffix>"},
    named_tokens={"image_token": "<|img|>"},
)
