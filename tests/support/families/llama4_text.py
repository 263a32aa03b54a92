"""Tiny models of llama4_text."""

from tests.support.families import llama4
from tests.support.families.base import SMALL, VOCABULARY, Fields, TinyFamily
from tests.support.families.llama4 import PLAIN

FIELDS: Fields = {"text": llama4.FIELDS["text"] | {"vocab_size": VOCABULARY}, "vision": {}, "top": {}}
FAMILY = TinyFamily(
    FIELDS,
    "Llama4TextConfig",
    "Llama4ForCausalLM",
    "",
    configurations={
        "as Scout, bf16": dict(text=SMALL, dtype="bfloat16", seed=56),
        "as Maverick, one key-value head, shards": dict(
            text=SMALL
            | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_local_experts": 128}
            | {"num_key_value_heads": 1, "rope_parameters": PLAIN},
            shard_size="50KB",
            seed=57,
        ),
        "as MobileLLM-R1: no experts, rope in every layer, queries as they are, tied head": dict(
            text=SMALL
            | {"moe_layers": [], "interleave_moe_layer_step": 0, "num_local_experts": 0, "num_experts_per_tok": 0}
            | {"no_rope_layers": [1, 1, 1, 1], "attn_temperature_tuning": False, "rope_parameters": PLAIN},
            top={"tie_word_embeddings": True},
            seed=58,
        ),
        "two experts, biases, layers named, chunks of seven": dict(
            text=SMALL
            | {"num_experts_per_tok": 2, "attention_bias": True, "no_rope_layers": [1, 0, 0, 1], "moe_layers": [1, 2]}
            | {"attention_chunk_size": 7, "floor_scale": 3, "attn_scale": 0.3},
            seed=59,
        ),
    },
    values=llama4.values,
    image="",
)
