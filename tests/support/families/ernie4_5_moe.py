"""Tiny models of ernie4_5_moe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.families.base import SMALL, TEXT, Fields, TinyFamily

if TYPE_CHECKING:
    import torch

NOT_OURS = ("num_experts_per_tok", "head_dim")
FIELDS: Fields = {
    "text": {name: value for name, value in TEXT.items() if name not in NOT_OURS}
    | {
        **{"hidden_size": 64, "moe_num_experts": 8, "moe_num_shared_experts": 2, "moe_k": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "vision": {},
    "top": {},
}


def values(name: str, normal: torch.Tensor) -> torch.Tensor | None:
    return 0.1 * normal if name.endswith("e_score_correction_bias") else None


FAMILY = TinyFamily(
    FIELDS,
    "Ernie4_5_MoeConfig",
    "Ernie4_5_MoeForCausalLM",
    "",
    configurations={
        "as 21B, bf16": dict(text=SMALL, dtype="bfloat16", seed=121),
        "as 300B: no shared experts, the first layers dense, a head of its own": dict(
            text=SMALL
            | {"moe_num_shared_experts": 0, "moe_layer_start_index": 2, "num_hidden_layers": 4, "moe_k": 3}
            | {"rms_norm_eps": 1e-3},
            top={"tie_word_embeddings": False},
            seed=122,
        ),
        "every other layer sparse, the last one dense, one key-value head, shards": dict(
            text=SMALL
            | {"moe_layer_interval": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 3, "num_hidden_layers": 6}
            | {"num_key_value_heads": 1},
            shard_size="20KB",
            seed=123,
        ),
        "all layers sparse, many experts, one shared, linear rope": dict(
            text=SMALL
            | {"moe_layer_start_index": 0, "moe_num_experts": 32, "moe_k": 8, "moe_num_shared_experts": 1}
            | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
            seed=124,
        ),
    },
    values=values,
    image="",
)
