"""Tiny models of glm4v_moe."""

from tests.support.families.base import IDS, SMALL, TEXT, VISION, VISION_END, VISION_START, Fields, TinyFamily

FIELDS: Fields = {
    "text": TEXT
    | {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "vision": VISION | {"image_size": 20},
    "top": IDS
    | {
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
        "video_start_token_id": VISION_START,
        "video_end_token_id": VISION_END,
    },
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILY = TinyFamily(
    FIELDS,
    "Glm4vMoeConfig",
    "Glm4vMoeForConditionalGeneration",
    "Glm4vImageProcessor",
    configurations={
        "groups, shared expert": dict(text=SMALL, seed=8),
        "no group, all sparse, two shared experts, bf16, whole rope, no bias": dict(
            text=SMALL
            | {
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 0,
                "n_shared_experts": 2,
                "attention_bias": False,
                "rope_parameters": FIELDS["text"]["rope_parameters"]
                | {"mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0},
            },
            vision={"attention_bias": True},
            dtype="bfloat16",
            seed=9,
        ),
        "two of four groups, weights as they are, tied head": dict(
            text=SMALL
            | {
                "num_hidden_layers": 3,
                "n_routed_experts": 16,
                "num_experts_per_tok": 4,
                "n_group": 4,
                "topk_group": 2,
                "norm_topk_prob": False,
                "num_key_value_heads": 1,
            },
            top={"tie_word_embeddings": True},
            seed=10,
        ),
        "odd patches, merge of 3, whole groups, scaled, rope of Llama 3": dict(
            text=SMALL
            | {"num_experts_per_tok": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_hidden_layers": 3}
            | {"rope_parameters": FIELDS["text"]["rope_parameters"] | LLAMA3},
            vision={"patch_size": 3, "temporal_patch_size": 1, "spatial_merge_size": 3, "image_size": 15},
            seed=11,
        ),
    },
    video_processor="Glm4vVideoProcessor",
)
