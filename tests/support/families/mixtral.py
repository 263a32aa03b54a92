"""Tiny models of mixtral."""

from tests.support.families.base import SMALL, TEXT, Fields, TinyFamily

FIELDS: Fields = {
    "text": {key: value for key, value in TEXT.items() if key != "moe_intermediate_size"}
    | {"num_local_experts": 8, "rope_parameters": {"rope_theta": 1e4}},
    "vision": {},
    "top": {},
}
FAMILY = TinyFamily(
    FIELDS,
    "MixtralConfig",
    "MixtralForCausalLM",
    "",
    configurations={
        "as published, bf16": dict(text=SMALL, dtype="bfloat16", seed=71),
        "a window, heads said to be smaller": dict(text=SMALL | {"sliding_window": 6, "head_dim": 8}, seed=72),
        "as many key-value heads, one expert of four, tied head, fp16": dict(
            text=SMALL | {"num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 1},
            top={"tie_word_embeddings": True},
            dtype="float16",
            seed=73,
        ),
        "more layers, wide experts, linear rope, shards": dict(
            text=SMALL
            | {"num_hidden_layers": 4, "intermediate_size": 72, "num_experts_per_tok": 3}
            | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 3.0}},
            shard_size="20KB",
            seed=74,
        ),
    },
    image="",
)
