"""Tiny models of qwen3_5: no experts."""

from tests.support.families import qwen3_5_moe
from tests.support.families.base import SMALL, Fields, TinyFamily
from tests.support.families.qwen3_5_moe import rope, values

_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
_TEXT = {key: value for key, value in qwen3_5_moe.FIELDS["text"].items() if key not in _OF_EXPERTS}
FIELDS: Fields = qwen3_5_moe.FIELDS | {"text": _TEXT | {"intermediate_size": 40}}
FAMILY = TinyFamily(
    FIELDS,
    "Qwen3_5Config",
    "Qwen3_5ForConditionalGeneration",
    "Qwen2VLImageProcessorFast",
    configurations={
        "three of the delta rule to one of attention, tied head": dict(
            text=SMALL | {"num_hidden_layers": 4, "layer_types": None},
            top={"tie_word_embeddings": True},
            seed=41,
        ),
        "three value heads to a key head, biases, bf16": dict(
            text=SMALL | {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "attention_bias": True},
            dtype="bfloat16",
            seed=42,
        ),
        "attention first, short kernel, wide feed-forward": dict(
            text=SMALL
            | {"layer_types": ["full_attention", "linear_attention"], "linear_conv_kernel_dim": 2}
            | {"intermediate_size": 72, "num_key_value_heads": 1},
            seed=43,
        ),
        "whole heads turned, wide keys, merge of 3": dict(
            text=SMALL
            | {"rope_parameters": rope([3, 3, 2], partial_rotary_factor=1.0)}
            | {"linear_key_head_dim": 24, "linear_value_head_dim": 8},
            vision={"spatial_merge_size": 3, "num_heads": 4, "num_position_embeddings": 9},
            seed=44,
        ),
    },
    values=values,
    video_processor="Qwen3VLVideoProcessor",
)
