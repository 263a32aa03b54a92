"""Tiny models of qwen3_next."""

from tests.support.families import qwen3_5_moe
from tests.support.families.base import SMALL, Fields, TinyFamily

ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
FIELDS: Fields = {
    "text": qwen3_5_moe.FIELDS["text"] | {"head_dim": 32, "rope_parameters": ROPE},
    "vision": {},
    "top": {},
}
FAMILY = TinyFamily(
    FIELDS,
    "Qwen3NextConfig",
    "Qwen3NextForCausalLM",
    "",
    configurations={
        "as published, bf16": dict(
            text=SMALL | {"num_hidden_layers": 4, "layer_types": None}, dtype="bfloat16", seed=111
        ),
        "as many value heads as key heads, short kernel, biases, weights as they are": dict(
            text=SMALL | qwen3_5_moe.SHORT_KERNEL | {"norm_topk_prob": False},
            seed=112,
        ),
        "attention first, wide keys, three value heads a key head, one expert of four, tied head": dict(
            text=SMALL | qwen3_5_moe.ATTENTION_FIRST,
            top={"tie_word_embeddings": True},
            seed=113,
        ),
        "many experts, whole heads turned, yarn, shards": dict(
            text=SMALL
            | {"num_experts": 32, "num_experts_per_tok": 8}
            | {
                "rope_parameters": {
                    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "partial_rotary_factor": 1.0},
                    "original_max_position_embeddings": 128,
                }
            },
            shard_size="20KB",
            seed=114,
        ),
    },
    values=qwen3_5_moe.values,
    image="",
)
