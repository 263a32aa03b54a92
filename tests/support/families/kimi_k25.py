"""Tiny models of kimi_k25."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.families.base import IMAGE, SMALL, TEXT, VISION_END, VISION_START, VOCABULARY, Fields, TinyFamily

if TYPE_CHECKING:
    import torch

DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FIELDS: Fields = {
    "text": {name: value for name, value in TEXT.items() if name != "head_dim"}
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "rope_parameters": YARN,
    },
    "vision": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "pos_emb_height": 5,
        "pos_emb_width": 5,
        "merge_kernel_size": [2, 2],
    },
    "top": {
        "projection_hidden_size": 16,
        "image_token_id": IMAGE,
        "video_token_id": VOCABULARY,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": False,
    },
}


def values(name: str, normal: torch.Tensor) -> torch.Tensor | None:
    if name.endswith("e_score_correction_bias"):
        return 0.1 * normal
    return normal if name.endswith("position_embeddings") else None


def preprocessor(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "patch_size": vision["patch_size"],
        "merge_size": vision["merge_kernel_size"][0],
        "max_patches": 256,
        "size": {"max_height": 64, "max_width": 64},
    }


# What transformers saves otherwise than it is published.
AS_PUBLISHED = {
    "language_model.model.blocks.": "language_model.model.layers.",
    "vision_tower.encoder.patch_embed.": "vision_tower.patch_embed.",
    "model.mm_projector.": "mm_projector.",
}


def published(directory: Path) -> None:
    """With the names of the hub."""
    from safetensors.torch import load_file, save_file

    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for theirs, hub in AS_PUBLISHED.items():
            tensors = {
                hub + name.removeprefix(theirs) if name.startswith(theirs) else name: tensor
                for name, tensor in tensors.items()
            }
        save_file(tensors, path, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text()
        for theirs, hub in AS_PUBLISHED.items():
            text = text.replace(f'"{theirs}', f'"{hub}')
        index.write_text(text)


FAMILY = TinyFamily(
    FIELDS,
    "Kimi_K25Config",
    "Kimi_K25ForConditionalGeneration",
    "Kimi_K25ImageProcessor",
    configurations={
        "as published, bf16": dict(text=SMALL, dtype="bfloat16", seed=71),
        "two of four groups, two dense layers, biases, plain rope, merge of 3": dict(
            text=SMALL
            | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 2, "num_hidden_layers": 3}
            | {"attention_bias": True, "rope_parameters": DEFAULT},
            vision={"merge_kernel_size": [3, 3], "patch_size": 3},
            top={"projection_layer_norm_eps": 1e-2},
            seed=72,
        ),
        "rows as halves, weights as they are, tied head, no merge": dict(
            text=SMALL
            | {"q_lora_rank": 20, "rope_interleave": False, "norm_topk_prob": False, "first_k_dense_replace": 0},
            vision={"merge_kernel_size": [1, 1], "num_attention_heads": 1, "pos_emb_height": 7, "pos_emb_width": 7},
            top={"tie_word_embeddings": True},
            seed=73,
        ),
        "two shared experts, wide values, one head, other scales of yarn, shards": dict(
            text=SMALL
            | {"n_shared_experts": 2, "v_head_dim": 40, "num_attention_heads": 1, "num_key_value_heads": 1}
            | {"num_experts_per_tok": 4, "rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 2.0}},
            vision={"num_hidden_layers": 3, "hidden_act": "gelu"},
            shard_size="20KB",
            seed=74,
        ),
    },
    values=values,
    published=published,
    preprocessor=preprocessor,
    image="<|media_begin|>image<|video_pad|><|media_pad|><|media_end|>",
    renamed={
        "<|image_pad|>": "<|media_pad|>",
        "<|vision_start|>": "<|media_begin|>",
        "<|vision_end|>": "<|media_end|>",
    },
)
