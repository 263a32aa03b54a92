"""Tiny models of qwen3_moe."""

from tests.support.families.base import SMALL, TEXT, Fields, TinyFamily

FIELDS: Fields = {
    "text": TEXT | {"num_experts": 8, "norm_topk_prob": True, "rope_parameters": {"rope_theta": 1e4}},
    "vision": {},
    "top": {},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
FAMILY = TinyFamily(
    FIELDS,
    "Qwen3MoeConfig",
    "Qwen3MoeForCausalLM",
    "",
    configurations={
        "yarn, bf16": dict(text=SMALL | {"rope_parameters": YARN}, dtype="bfloat16", seed=61),
        "weights as they are, tied head, one expert of four": dict(
            text=SMALL | {"norm_topk_prob": False, "num_experts": 4, "num_experts_per_tok": 1},
            top={"tie_word_embeddings": True},
            seed=62,
        ),
        "dense layers by name, biases, wide heads, shards": dict(
            text=SMALL | {"num_hidden_layers": 3, "mlp_only_layers": [0, 2], "attention_bias": True, "head_dim": 32},
            shard_size="20KB",
            seed=63,
        ),
        "every other layer sparse, one key-value head, fp16": dict(
            text=SMALL | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "num_key_value_heads": 1},
            dtype="float16",
            seed=64,
        ),
        "many experts, dynamic rope": dict(
            text=SMALL
            | {"num_experts": 32, "num_experts_per_tok": 8}
            | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            seed=65,
        ),
    },
    image="",
)
