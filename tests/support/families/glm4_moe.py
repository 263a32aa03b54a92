"""Tiny models of glm4_moe."""

from tests.support.families.base import SMALL, TEXT, Fields, TinyFamily

FIELDS: Fields = {
    "text": TEXT
    | {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "vision": {},
    "top": {},
}
FAMILY = TinyFamily(
    FIELDS,
    "Glm4MoeConfig",
    "Glm4MoeForCausalLM",
    "",
    configurations={
        "as Air, biases, bf16": dict(text=SMALL | {"attention_bias": True}, dtype="bfloat16", seed=81),
        "q/k norms, three dense layers": dict(
            text=SMALL | {"use_qk_norm": True, "num_hidden_layers": 5, "first_k_dense_replace": 3}, seed=82
        ),
        "groups, two shared experts, weights as they are, tied head": dict(
            text=SMALL
            | {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 2, "norm_topk_prob": False},
            top={"tie_word_embeddings": True},
            seed=83,
        ),
        "all sparse, whole heads turned, yarn, one key-value head, shards": dict(
            text=SMALL
            | {"first_k_dense_replace": 0, "num_key_value_heads": 1}
            | {
                "rope_parameters": {
                    **{"rope_type": "yarn", "rope_theta": 1e6, "partial_rotary_factor": 1.0},
                    **{"factor": 8.0, "original_max_position_embeddings": 64},
                }
            },
            shard_size="20KB",
            seed=84,
        ),
    },
    image="",
)
