"""Tiny models of glm4_moe_lite."""

from tests.support.families import deepseek_v3
from tests.support.families.base import SMALL, Fields, TinyFamily
from tests.support.families.deepseek_v3 import YARN

OF_DEEPSEEK = ("first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor", "rope_parameters")
FIELDS: Fields = deepseek_v3.FIELDS | {
    "text": {name: value for name, value in deepseek_v3.FIELDS["text"].items() if name not in OF_DEEPSEEK}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
}
FAMILY = TinyFamily(
    FIELDS,
    "Glm4MoeLiteConfig",
    "Glm4MoeLiteForCausalLM",
    "",
    configurations={
        "as published, bf16": dict(text=SMALL, dtype="bfloat16", seed=101),
        "a dense layer between, two of four groups, weights as they are, tied head": dict(
            text=SMALL
            | {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"], "norm_topk_prob": False}
            | {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.0},
            top={"tie_word_embeddings": True},
            seed=102,
        ),
        "queries at once, biases, rows as halves, yarn": dict(
            text=SMALL
            | {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False, "rope_parameters": YARN}
            | {"mlp_layer_types": ["sparse", "sparse"]},
            seed=103,
        ),
        "values wider than keys, one head, many experts, shards": dict(
            text=SMALL
            | {"num_attention_heads": 1, "num_key_value_heads": 1, "v_head_dim": 40, "qk_nope_head_dim": 24}
            | {"n_routed_experts": 32, "num_experts_per_tok": 4, "rms_norm_eps": 1e-3},
            shard_size="20KB",
            seed=104,
        ),
    },
    image="",
)
