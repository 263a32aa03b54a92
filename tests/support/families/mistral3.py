"""Tiny models of mistral3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.support.families.base import IMAGE, TEXT, Fields, TinyFamily

if TYPE_CHECKING:
    import torch

MINISTRAL3 = {
    **{key: value for key, value in TEXT.items() if key not in ("moe_intermediate_size", "num_experts_per_tok")},
    "model_type": "ministral3",
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 512,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
FIELDS: Fields = {
    "text": MINISTRAL3,
    "vision": {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "silu",
        "image_size": 40,
        "patch_size": 4,
    },
    "top": {"image_token_index": IMAGE, "tie_word_embeddings": False},
}


def values(name: str, normal: torch.Tensor) -> torch.Tensor | None:
    return 1 + 0.2 * normal if name.endswith("ln_pre.weight") else None


def preprocessor(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "patch_size": {"height": vision["patch_size"], "width": vision["patch_size"]},
        "size": {"longest_edge": 200},
    }


SMALL: dict[str, Any] = {"vocab_size": 96}
FAMILY = TinyFamily(
    FIELDS,
    "Mistral3Config",
    "Mistral3ForConditionalGeneration",
    "PixtralImageProcessor",
    configurations={
        "dense, bf16": dict(text=SMALL, dtype="bfloat16", seed=61),
        "biases of the projector, merge of 3, window": dict(
            text=SMALL | {"sliding_window": 6, "num_key_value_heads": 4},
            vision={"hidden_act": "gelu", "patch_size": 3},
            top={"multimodal_projector_bias": True, "spatial_merge_size": 3, "projector_hidden_act": "gelu"},
            seed=62,
        ),
        "tied head, no merge": dict(
            text=SMALL | {"head_dim": 8}, top={"tie_word_embeddings": True, "spatial_merge_size": 1}, seed=63
        ),
        "one key head": dict(text=SMALL | {"num_key_value_heads": 1}, seed=64),
    },
    values=values,
    preprocessor=preprocessor,
    image="[IMG]",
    renamed={"<|image_pad|>": "[IMG]", "<|vision_start|>": "[IMG_BREAK]", "<|vision_end|>": "[IMG_END]"},
)
