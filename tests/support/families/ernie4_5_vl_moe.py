"""Tiny models of ernie4_5_vl_moe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.support.families.base import IDS, SMALL, TEXT, VIDEO, VISION_END, VISION_START, Fields, TinyFamily

if TYPE_CHECKING:
    import torch

NOT_OURS = ("moe_intermediate_size", "num_experts_per_tok", "head_dim")
ROPE = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]}
FIELDS: Fields = {
    "text": {name: value for name, value in TEXT.items() if name not in NOT_OURS}
    | {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "moe_intermediate_size": [24, 16],
        "moe_num_experts": 8,
        "moe_num_shared_experts": 2,
        "moe_k": 2,
        "rope_parameters": ROPE,
    },
    "vision": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
    },
    "top": IDS
    | {
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
        "video_start_token_id": VIDEO,
        "video_end_token_id": VIDEO,
        "tie_word_embeddings": True,
    },
}


def values(name: str, normal: torch.Tensor) -> torch.Tensor | None:
    if name.endswith("e_score_correction_bias"):
        return 0.1 * normal
    if name.endswith((".ln.weight", ".norm1.weight", ".norm2.weight")):
        return 1 + 0.2 * normal
    return None


def preprocessor(vision: Mapping[str, Any]) -> dict[str, Any]:
    merge = vision.get("spatial_merge_size", 2)
    unit = vision["patch_size"] * merge
    return {
        "patch_size": vision["patch_size"],
        "merge_size": merge,
        "temporal_patch_size": 1,
        "size": {"shortest_edge": unit**2, "longest_edge": 36 * unit**2},
    }


FAMILY = TinyFamily(
    FIELDS,
    "Ernie4_5_VLMoeConfig",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Ernie4_5_VLMoeImageProcessor",
    configurations={
        "as published, bf16": dict(text=SMALL, dtype="bfloat16", seed=81),
        "untied head, no shared expert, two dense layers, merge of 3": dict(
            text=SMALL
            | {"moe_num_shared_experts": 0, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "dense", "sparse"]},
            vision={"spatial_merge_size": 3, "patch_size": 3, "rms_norm_eps": 1e-2},
            top={"tie_word_embeddings": False},
            seed=82,
        ),
        "wider experts for images, all layers sparse, other sections, one head of the tower": dict(
            text=SMALL
            | {"moe_intermediate_size": [8, 40], "moe_k": 4, "mlp_layer_types": ["sparse", "sparse"]}
            | {"rope_parameters": ROPE | {"mrope_section": [2, 2, 4], "rope_theta": 1e4}, "rms_norm_eps": 1e-3},
            vision={"num_heads": 1, "hidden_act": "gelu"},
            seed=83,
        ),
        "one shared expert, four heads of wide keys, every expert, no merge, shards": dict(
            text=SMALL
            | {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "moe_num_shared_experts": 1}
            | {"moe_k": 3, "moe_num_experts": 3},
            vision={"spatial_merge_size": 1, "depth": 3},
            shard_size="20KB",
            seed=84,
        ),
    },
    values=values,
    preprocessor=preprocessor,
    renamed={
        "<|vision_start|>": "<|IMAGE_START|>",
        "<|vision_end|>": "<|IMAGE_END|>",
        "<|image_pad|>": "<|IMAGE_PLACEHOLDER|>",
    },
    image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
)
