"""Tiny models of deepseek_v3."""

from tests.support.families.base import SMALL, TEXT, Fields, TinyFamily

YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}
FIELDS: Fields = {
    "text": {name: value for name, value in TEXT.items() if name != "head_dim"}
    | {
        **{"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32},
        **{"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16},
        **{"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
        **{"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "rope_parameters": YARN},
    },
    "vision": {},
    "top": {},
}
FAMILY = TinyFamily(
    FIELDS,
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "",
    configurations={
        "groups, a shared expert, yarn, bf16": dict(text=SMALL, dtype="bfloat16", seed=91),
        "queries at once, no group, all sparse, two shared experts, biases, plain rope, as halves": dict(
            text=SMALL
            | {"q_lora_rank": None, "n_group": 1, "first_k_dense_replace": 0, "n_shared_experts": 2}
            | {"attention_bias": True, "rope_interleave": False}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            seed=92,
        ),
        "two of four groups, weights as they are, wide values, two scales of yarn, tied head": dict(
            text=SMALL
            | {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
            | {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "num_hidden_layers": 3}
            | {"v_head_dim": 24, "qk_nope_head_dim": 6, "qk_rope_head_dim": 16}
            | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
            top={"tie_word_embeddings": True},
            seed=93,
        ),
        "one head, layers that are dense, a narrow latent, biases, norms of another epsilon, shards": dict(
            text=SMALL
            | {"num_attention_heads": 1, "num_key_value_heads": 1, "kv_lora_rank": 8, "attention_bias": True}
            | {"num_hidden_layers": 4, "first_k_dense_replace": 3, "rms_norm_eps": 1e-2}
            | {"rope_parameters": YARN | {"mscale_all_dim": 0}},
            shard_size="20KB",
            seed=94,
        ),
    },
    image="",
)
