"""Tiny models of internvl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.support.families.base import IMAGE, SMALL, TEXT, Fields, TinyFamily

if TYPE_CHECKING:
    import torch

FIELDS: Fields = {
    "text": TEXT | {"model_type": "qwen3_moe", "num_experts": 8, "norm_topk_prob": True},
    "vision": {
        "model_type": "internvl_vision",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [16, 16],
        "patch_size": [4, 4],
    },
    "top": {"image_token_id": IMAGE, "image_seq_length": 4, "tie_word_embeddings": False},
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "intermediate_size": 24,
    "moe_intermediate_size": ...,
    "norm_topk_prob": ...,
    "num_experts": ...,
    "num_local_experts": 8,
    "sliding_window": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}


def values(name: str, normal: torch.Tensor) -> torch.Tensor | None:
    if "lambda" in name:
        return 0.5 + 0.2 * normal
    if "position_embeddings" in name or name.endswith("token"):
        return 0.5 * normal
    return None


def preprocessor(vision: Mapping[str, Any]) -> dict[str, Any]:
    """As published but for the size: InternVL's processor cuts images whatever crop_to_patches says."""
    height, width = vision["image_size"]
    return {
        "size": {"height": height, "width": width},
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 6,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


FAMILY = TinyFamily(
    FIELDS,
    "InternVLConfig",
    "InternVLForConditionalGeneration",
    "GotOcr2ImageProcessor",
    configurations={
        "bf16, biases of the tower's attention": dict(
            text=SMALL, vision={"attention_bias": True}, dtype="bfloat16", seed=71
        ),
        "tied head, rms norms of queries and keys, a dense layer, biases": dict(
            text=SMALL | {"mlp_only_layers": [0], "attention_bias": True},
            vision={"norm_type": "rms_norm", "use_qk_norm": True, "num_attention_heads": 4},
            top={"tie_word_embeddings": True},
            seed=72,
        ),
        "quarters, last norm, yarn, one expert": dict(
            text=SMALL
            | {
                "num_experts_per_tok": 1,
                "norm_topk_prob": False,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            vision={"use_mean_pooling": False, "use_mask_token": True, "image_size": [32, 32]},
            top={"downsample_ratio": 0.25, "projector_hidden_act": "silu"},
            seed=73,
        ),
        "gpt-oss": dict(text=SMALL | GPT_OSS, seed=74),
        "gpt-oss, three layers, one key head, layer from the front": dict(
            text=SMALL | GPT_OSS | {"num_hidden_layers": 3, "num_key_value_heads": 1, "num_experts_per_tok": 4},
            top={"vision_feature_layer": 2, "vision_feature_select_strategy": "default"},
            seed=75,
        ),
    },
    values=values,
    preprocessor=preprocessor,
    image="<IMG_CONTEXT>",
    renamed={"<|image_pad|>": "<IMG_CONTEXT>", "<|vision_start|>": "<img>", "<|vision_end|>": "</img>"},
    named_tokens={
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
    },
)
