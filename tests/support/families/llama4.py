"""Tiny models of llama4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.support.families.base import IMAGE, SMALL, TEXT, VISION_END, VISION_START, VOCABULARY, Fields, TinyFamily

if TYPE_CHECKING:
    import torch

SEPARATORS = ("<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
FIELDS: Fields = {
    "text": {
        key: TEXT[key]
        for key in (
            *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
            *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
        )
    }
    | {
        "vocab_size": VOCABULARY + len(SEPARATORS),
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "intermediate_size_mlp": 40,
        "num_local_experts": 8,
        "attention_chunk_size": 16,
        "floor_scale": 8,
        "attn_scale": 0.5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
    "vision": {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "projector_input_dim": 24,
        "projector_output_dim": 24,
        "vision_output_dim": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "top": {"image_token_index": IMAGE, "boi_token_index": VISION_START, "eoi_token_index": VISION_END},
}


def values(name: str, normal: torch.Tensor) -> torch.Tensor | None:
    """Experts [E, in, out] by their inputs; embeddings of positions and of the class like those of patches."""
    if ".experts." in name:
        return normal / normal.shape[1] ** 0.5
    if "embedding_vlm" in name or "class_embedding" in name:
        return 0.5 * normal
    return None


def preprocessor(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {"size": {"height": vision["image_size"], "width": vision["image_size"]}, "max_patches": 6}


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
FAMILY = TinyFamily(
    FIELDS,
    "Llama4Config",
    "Llama4ForConditionalGeneration",
    "Llama4ImageProcessor",
    configurations={
        "as Scout, bf16": dict(text=SMALL, dtype="bfloat16", seed=51),
        "as Maverick: layers without experts, no norms of queries and keys": dict(
            text=SMALL
            | {
                "interleave_moe_layer_step": 2,
                "use_qk_norm": False,
                "num_local_experts": 130,
                "rope_parameters": PLAIN,
            },
            seed=52,
        ),
        "three experts, biases, heads of one size, layers named, tiles of four tokens": dict(
            text=SMALL
            | {
                "num_experts_per_tok": 3,
                "attention_bias": True,
                "num_key_value_heads": 4,
                "no_rope_layers": [0, 1, 1, 0],
                "moe_layers": [0, 3],
                "attention_chunk_size": 5,
            },
            vision={"image_size": 32, "patch_size": 8},
            seed=53,
        ),
        "no chunks, queries as they are, tied head, quarters": dict(
            text=SMALL
            | {
                "attention_chunk_size": None,
                "attn_temperature_tuning": False,
                "rope_parameters": PLAIN,
                "tie_word_embeddings": True,
            },
            vision={"pixel_shuffle_ratio": 0.25, "intermediate_size": 256, "image_size": 32},
            seed=54,
        ),
        "wide heads, chunks of one, another base": dict(
            text=SMALL | {"head_dim": 32, "attention_chunk_size": 1, "no_rope_layer_interval": 2},
            vision={"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "num_attention_heads": 1},
            seed=55,
        ),
    },
    values=values,
    preprocessor=preprocessor,
    image="<|image|>",
    renamed={
        "<|vision_start|>": "<|image_start|>",
        "<|vision_end|>": "<|image_end|>",
        "<|image_pad|>": "<|patch|>",
    },
    tokens=SEPARATORS,
)
