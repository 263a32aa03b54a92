"""Tiny models of qwen3_5_moe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.families.base import IDS, SMALL, TEXT, VISION, VISION_END, VISION_START, Fields, TinyFamily

if TYPE_CHECKING:
    import torch

FIELDS: Fields = {
    "text": {key: value for key, value in TEXT.items() if key != "intermediate_size"}
    | {
        "num_experts": 8,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    "vision": VISION | {"num_position_embeddings": 25},
    "top": IDS | {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END},
}


def rope(sections: list[int], **fields: object) -> dict[str, object]:
    return FIELDS["text"]["rope_parameters"] | {"mrope_section": sections} | fields


def values(name: str, normal: torch.Tensor) -> torch.Tensor | None:
    """Norms are stored as their difference from 1, but for the one behind the delta rule; decays differ widely."""
    if name.endswith("norm.weight") and "linear_attn" not in name and "visual" not in name:
        return 0.2 * normal
    return normal if name.endswith(("A_log", "dt_bias")) else None


# As many value heads as key heads, a short kernel, biases.
SHORT_KERNEL = {
    **{"linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_conv_kernel_dim": 2},
    **{"attention_bias": True, "num_key_value_heads": 1},
}
# Attention before the delta rule, wide keys, three value heads to a key head, one expert of four.
ATTENTION_FIRST = {
    **{"layer_types": ["full_attention", "linear_attention", "linear_attention"], "num_hidden_layers": 3},
    **{"linear_key_head_dim": 24, "linear_value_head_dim": 8, "linear_num_value_heads": 6},
    **{"num_experts": 4, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 40},
}
FAMILY = TinyFamily(
    FIELDS,
    "Qwen3_5MoeConfig",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen2VLImageProcessorFast",
    configurations={
        "three of the delta rule to one of attention, a quarter of a head turned": dict(
            text=SMALL
            | {"num_hidden_layers": 4, "layer_types": None, "head_dim": 32}
            | {"rope_parameters": rope([2, 1, 1], partial_rotary_factor=0.25)},
            seed=21,
        ),
        "as many value heads as key heads, short kernel, biases, bf16": dict(
            text=SMALL | SHORT_KERNEL,
            dtype="bfloat16",
            seed=22,
        ),
        "attention first, wide keys, one expert of four, tied head": dict(
            text=SMALL | ATTENTION_FIRST,
            top={"tie_word_embeddings": True},
            seed=23,
        ),
        "every third layer attends, many experts, merge of 3": dict(
            text=SMALL
            | {
                "layer_types": None,
                "full_attention_interval": 3,
                "num_hidden_layers": 3,
                "num_experts": 16,
                "num_experts_per_tok": 4,
            },
            vision={"depth": 3, "spatial_merge_size": 3, "num_heads": 4, "num_position_embeddings": 9},
            seed=24,
        ),
        "attention in every layer, whole heads turned, linear rope, odd patches": dict(
            text=SMALL
            | {"layer_types": ["full_attention"] * 2}
            | {"rope_parameters": rope([3, 3, 2], partial_rotary_factor=1.0, rope_type="linear", factor=4.0)},
            vision={"patch_size": 3, "temporal_patch_size": 1},
            seed=25,
        ),
    },
    values=values,
    video_processor="Qwen3VLVideoProcessor",
)
