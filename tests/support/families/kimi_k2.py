"""Tiny models of kimi_k2: DeepSeek-V3 under another model_type, its rope as before transformers 5."""

import json
from pathlib import Path

from tests.support.families import deepseek_v3
from tests.support.families.base import SMALL, Fields, TinyFamily
from tests.support.families.deepseek_v3 import YARN

FIELDS: Fields = deepseek_v3.FIELDS | {
    "text": deepseek_v3.FIELDS["text"]
    | {"n_group": 1, "routed_scaling_factor": 2.827, "rope_parameters": YARN | {"rope_theta": 5e4, "beta_fast": 1.0}}
}


def published(directory: Path) -> None:
    """With config.json of the hub: a class in its own code, whose architecture transformers knows."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"model_type": "kimi_k2", "rope_theta": rope.pop("rope_theta"), "num_nextn_predict_layers": 0}
    scaled = rope | {"type": rope.pop("rope_type")}
    config |= {"rope_scaling": None if scaled == {"type": "default"} else scaled, "topk_method": "noaux_tc"}
    config |= {"scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001}
    modeling = {f"Auto{kind}": f"modeling_deepseek.DeepseekV3{kind[5:]}" for kind in ("Model", "ModelForCausalLM")}
    config |= {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"} | modeling}
    path.write_text(json.dumps(config))


FAMILY = TinyFamily(
    FIELDS,
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "",
    configurations={
        "as published, bf16": dict(text=SMALL, dtype="bfloat16", seed=95),
        "many experts, three layers, half as many heads of another size, shards": dict(
            text=SMALL
            | {"n_routed_experts": 48, "num_experts_per_tok": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
            | {"num_key_value_heads": 2, "qk_nope_head_dim": 24, "v_head_dim": 8, "rms_norm_eps": 1e-3},
            shard_size="20KB",
            seed=96,
        ),
        "queries at once, two dense layers, plain rope, tied head": dict(
            text=SMALL
            | {"q_lora_rank": None, "first_k_dense_replace": 2, "num_hidden_layers": 3}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            top={"tie_word_embeddings": True},
            seed=97,
        ),
        "two shared experts, another factor of yarn, all layers sparse": dict(
            text=SMALL
            | {"n_shared_experts": 2, "first_k_dense_replace": 0}
            | {"rope_parameters": YARN | {"rope_theta": 5e4, "factor": 32.0, "beta_fast": 1.0}},
            seed=98,
        ),
    },
    image="",
    published=published,
)
