"""The demo model: transformers' Qwen3-VL-MoE, a few million parameters."""

from __future__ import annotations

from typing import Any

from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from demo.tokenizer import VOCAB_SIZE

# Expert and hidden widths are multiples of 128: the largest group size of quantized weights.
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=16,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    moe_intermediate_size=128,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    router_aux_loss_coef=0.01,
    max_position_embeddings=2048,
    initializer_range=0.05,
    tie_word_embeddings=False,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
)
VISION: dict[str, Any] = dict(
    depth=3,
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    patch_size=8,
    temporal_patch_size=2,
    spatial_merge_size=2,
    out_hidden_size=128,
    num_position_embeddings=256,
    deepstack_visual_indexes=[0, 1],
    initializer_range=0.05,
)


def build(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLMoeForConditionalGeneration:
    """A freshly initialised model whose special tokens are the tokenizer's."""
    token = tokenizer.convert_tokens_to_ids
    stop = [token("<|im_end|>"), token("<|endoftext|>")]
    config = Qwen3VLMoeConfig(
        text_config={**TEXT, "pad_token_id": stop[1], "eos_token_id": stop},
        vision_config=VISION,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stop, pad_token_id=stop[1], max_new_tokens=96
    )
    # The loop over experts multiplies dense blocks: the fastest of the three on a CPU.
    model.set_experts_implementation("eager")
    return model


def image_processor() -> Qwen2VLImageProcessorPil:
    """Leaves the training images (multiples of 16 px) as they are; shrinks photos to 128x128."""
    return Qwen2VLImageProcessorPil(
        patch_size=VISION["patch_size"],
        merge_size=VISION["spatial_merge_size"],
        temporal_patch_size=VISION["temporal_patch_size"],
        size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
