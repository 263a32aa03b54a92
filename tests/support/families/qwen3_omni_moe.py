"""Tiny models of qwen3_omni_moe: thinkers, saved as they are published, with a talker's tensors beside them."""

import json
from pathlib import Path

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
            "interleaved": True,
        },
    },
    "vision": VISION | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]},
    "top": IDS
    | {
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "audio_token_id": 90,
        "audio_start_token_id": 91,
        "audio_config": {
            **{"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16},
            **{"d_model": 8, "output_dim": 32, "max_source_positions": 32, "downsample_hidden_size": 4},
        },
    },
}


def published(directory: Path) -> None:
    """The thinker's config inside of one, its tensors under `thinker.`, and some of what speaks."""
    from safetensors.torch import load_file, save_file

    path = directory / "config.json"
    outer = {
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": True,
        "im_start_token_id": 1,
        "tts_bos_token_id": 95,
    }
    path.write_text(json.dumps({**outer, "thinker_config": json.loads(path.read_text())}))
    shards = {}
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        named = {f"thinker.{name}": tensor for name, tensor in tensors.items()}
        some = next(iter(tensors.values()))
        named |= {f"talker.model.{shard.stem}.weight": some.clone(), f"code2wav.{shard.stem}.weight": some.clone()}
        save_file(named, shard, {"format": "pt"})
        shards |= dict.fromkeys(named, shard.name)
    if (index := directory / "model.safetensors.index.json").exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))


FAMILY = TinyFamily(
    FIELDS,
    "Qwen3OmniMoeThinkerConfig",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen2VLImageProcessorFast",
    configurations={
        "deepstack out of order, one expert of four": dict(
            text=SMALL | {"num_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 3},
            vision={"depth": 3, "deepstack_visual_indexes": [2, 0]},
            seed=31,
        ),
        "weights as they are, dense layer, biases, bf16": dict(
            text=SMALL | {"norm_topk_prob": False, "mlp_only_layers": [0], "attention_bias": True},
            dtype="bfloat16",
            seed=32,
        ),
        "every other layer sparse, one key-value head, no deepstack": dict(
            text=SMALL | {"decoder_sparse_step": 2, "num_hidden_layers": 3, "num_key_value_heads": 1},
            vision={"deepstack_visual_indexes": []},
            seed=33,
        ),
        "many experts, merge of 3, odd patches, shards": dict(
            text=SMALL | {"num_experts": 16, "num_experts_per_tok": 4},
            vision={"spatial_merge_size": 3, "patch_size": 3, "temporal_patch_size": 1, "num_heads": 4},
            shard_size="100KB",
            seed=34,
        ),
    },
    published=published,
)
