"""Tiny models of qwen3_vl_moe."""

from tests.support.families.base import IDS, SMALL, TEXT, VISION, VISION_END, VISION_START, Fields, TinyFamily

FIELDS: Fields = {
    "text": TEXT
    | {
        "num_experts": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
    "vision": VISION | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]},
    "top": IDS | {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END},
}


def rope(sections: list[int], **fields: object) -> dict[str, object]:
    return FIELDS["text"]["rope_parameters"] | {"mrope_section": sections} | fields


YARN = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 8.0, "original_max_position_embeddings": 64}
FAMILY = TinyFamily(
    FIELDS,
    "Qwen3VLMoeConfig",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen2VLImageProcessorFast",
    configurations={
        "tied head, bf16, one expert of four": dict(
            text=SMALL | {"num_experts": 4, "num_experts_per_tok": 1},
            top={"tie_word_embeddings": True},
            dtype="bfloat16",
            seed=1,
        ),
        "on the hub, many shards": dict(text=SMALL, hub=True, shard_size="20KB", seed=2),
        "dense layers by name, fp16": dict(
            text=SMALL | {"num_hidden_layers": 3, "mlp_only_layers": [0, 2]}, dtype="float16", seed=3
        ),
        "every other layer sparse, attention bias, one key-value head": dict(
            text=SMALL
            | {"num_hidden_layers": 3, "decoder_sparse_step": 2, "attention_bias": True, "num_key_value_heads": 1},
            seed=4,
        ),
        "no deepstack, wide heads, odd patches, yarn": dict(
            text=SMALL | {"head_dim": 32, "num_key_value_heads": 4, "rope_parameters": rope([6, 5, 5], **YARN)},
            vision={"deepstack_visual_indexes": [], "patch_size": 3, "temporal_patch_size": 1},
            seed=5,
        ),
        "deepstack after every layer, levels out of order, merge of 3": dict(
            text=SMALL | {"num_hidden_layers": 3, "num_experts": 16, "num_experts_per_tok": 4},
            vision={"depth": 4, "deepstack_visual_indexes": [2, 0, 3], "spatial_merge_size": 3, "num_heads": 4},
            seed=6,
        ),
        "gelu and silu, small heads": dict(
            text=SMALL | {"head_dim": 8, "num_experts_per_tok": 3, "rope_parameters": rope([2, 1, 1])},
            vision={"hidden_act": "silu", "num_position_embeddings": 4, "deepstack_visual_indexes": [1]},
            seed=7,
        ),
    },
    video_processor="Qwen3VLVideoProcessor",
)
