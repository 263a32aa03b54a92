"""Tiny models of mistral3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.support.families.base import IMAGE, SMALL, TEXT, Fields, TinyFamily

if TYPE_CHECKING:
    import torch

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
MISTRAL4 = {name: value for name, value in TEXT.items() if name != "head_dim"} | {
    "model_type": "mistral4",
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
}
# On top of those, which it has not.
MINISTRAL3 = dict.fromkeys(MISTRAL4.keys() - TEXT.keys() | {"moe_intermediate_size", "num_experts_per_tok"}) | {
    "model_type": "ministral3",
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": ROPE,
}
FIELDS: Fields = {
    "text": MISTRAL4,
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


FAMILY = TinyFamily(
    FIELDS,
    "Mistral3Config",
    "Mistral3ForConditionalGeneration",
    "PixtralImageProcessor",
    configurations={
        "as published, bf16": dict(text=SMALL, dtype="bfloat16", seed=61),
        "groups, a dense layer, biases, steep scale of queries, merge of 3, biases of the projector": dict(
            text=SMALL
            | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "attention_bias": True}
            | {"num_hidden_layers": 3, "rope_parameters": MISTRAL4["rope_parameters"] | {"llama_4_scaling_beta": 2.0}},
            vision={"hidden_act": "gelu", "patch_size": 3},
            top={"multimodal_projector_bias": True, "spatial_merge_size": 3},
            seed=62,
        ),
        "queries at once, as halves, weights as they are, a quarter turns, tied head, no merge": dict(
            text=SMALL
            | {"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "routed_scaling_factor": 2.0}
            | {"qk_nope_head_dim": 24, "rope_parameters": ROPE | {"partial_rotary_factor": 0.25}},
            top={"tie_word_embeddings": True, "spatial_merge_size": 1},
            seed=63,
        ),
        "two shared experts, wide values, one head, other scales of yarn, fp16, shards": dict(
            text=SMALL
            | {"n_shared_experts": 2, "v_head_dim": 40, "num_attention_heads": 1, "num_key_value_heads": 1}
            | {"num_experts_per_tok": 4}
            | {"rope_parameters": MISTRAL4["rope_parameters"] | {"mscale": 0.5, "mscale_all_dim": 2.0}},
            top={"projector_hidden_act": "silu"},
            dtype="float16",
            shard_size="20KB",
            seed=64,
        ),
        "Ministral 3": dict(text=SMALL | MINISTRAL3, seed=65),
        "Ministral 3, window, as many heads of keys": dict(
            text=SMALL | MINISTRAL3 | {"sliding_window": 6, "num_key_value_heads": 4}, seed=66
        ),
    },
    values=values,
    preprocessor=preprocessor,
    image="[IMG]",
    renamed={"<|image_pad|>": "[IMG]", "<|vision_start|>": "[IMG_BREAK]", "<|vision_end|>": "[IMG_END]"},
)
