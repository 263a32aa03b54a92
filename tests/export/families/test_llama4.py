"""Llama 4 as it is published: which layers rotate, see chunks and have experts, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moevlm.export.config import DecoderConfig, MLPConfig, MoEConfig
from moevlm.export.families.fields import Fields
from moevlm.export.families.text import text_model
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.errors import MoevlmError
from moevlm.runtime.core.manifest import QueryScaleMetadata

# text_config of Llama-4-Scout-17B-16E-Instruct, as published.
SCOUT: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "bos_token_id": 200000,
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
# What differs in Llama-4-Maverick-17B-128E-Instruct.
MAVERICK: dict[str, Any] = {
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "floor_scale": 8192,
    "interleave_moe_layer_step": 2,
    "max_position_embeddings": 1048576,
    "num_local_experts": 128,
    "rope_scaling": None,
    "use_qk_norm": False,
}


def parse(**changes: Any) -> DecoderConfig:
    values = {name: value for name, value in (SCOUT | changes).items() if value is not ...}
    fields = Fields(values)
    decoder = text_model(fields, ("llama4_text",)).decoder(fields, tied=False)
    fields.refuse_unread()
    return decoder


def test_scout_as_published() -> None:
    decoder = parse()
    local, full = (decoder.layers[i].mixer for i in (2, 3))
    assert (local.chunk, local.rotary_dim, local.qk_norm, local.query_scale) == (8192, 128, True, False)
    assert (full.chunk, full.rotary_dim, full.qk_norm, full.query_scale) == (0, 0, False, True)
    assert [i for i, layer in enumerate(decoder.layers) if not layer.mixer.rotary_dim] == list(range(3, 48, 4))
    assert {layer.feed_forward for layer in decoder.layers} == {
        MoEConfig(
            16,
            8192,
            RouterSpec(1, "sigmoid", renormalize=False),
            ExpertsSpec(weight_on="input"),
            shared_width=8192,
        )
    }
    assert decoder.query_scale == QueryScaleMetadata(beta=0.1, original=8192, offset=1)
    assert len(decoder.ropes[0].frequencies) == 64


def test_maverick_as_published() -> None:
    decoder = parse(**MAVERICK)
    dense, sparse = (decoder.layers[i].feed_forward for i in (0, 1))
    assert dense == MLPConfig(16384, "silu")
    assert (sparse.experts, sparse.width, sparse.shared_width) == (128, 8192, 8192)
    assert [isinstance(layer.feed_forward, MoEConfig) for layer in decoder.layers] == [False, True] * 24
    assert not any(layer.mixer.qk_norm for layer in decoder.layers)
    assert (decoder.query_scale, decoder.ropes[0].frequencies) == (parse().query_scale, ())


@pytest.mark.parametrize(
    ("changes", "chunks"),
    [
        ({"attention_chunk_size": None}, [0, 0, 0, 0]),
        ({"attention_chunk_size": ...}, [8192, 8192, 8192, 0]),
        ({"no_rope_layers": [0, 1, 1, 1, 0, 0]}, [0, 8192, 8192, 8192]),
        ({"no_rope_layer_interval": 2}, [8192, 0, 8192, 0]),
        ({"layer_types": ["full_attention", "chunked_attention"] * 2}, [0, 8192, 0, 8192]),
    ],
    ids=["none", "by default", "by layer", "by interval", "by name"],
)
def test_layers_have_chunks_where_transformers_has_them(changes: dict[str, Any], chunks: list[int]) -> None:
    assert [layer.mixer.chunk for layer in parse(num_hidden_layers=4, **changes).layers] == chunks


def test_queries_are_scaled_where_the_config_says_so_and_some_layer_does_not_rotate() -> None:
    assert parse(attn_temperature_tuning=False).query_scale is None
    assert parse(no_rope_layers=[1] * 48).query_scale is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act = .gelu. \(supported: silu\)"),
        ({"attn_temperature_tuning": "yes"}, r"attn_temperature_tuning = .yes. \(supported: true, 4, false\)"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\] \(48 times 0 or 1\)"),
        ({"no_rope_layers": [2] * 48}, r"\(48 times 0 or 1\)"),
        ({"layer_types": ["sliding_attention"] * 48}, r"48 times chunked_attention or full_attention"),
        ({"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 48}, r"48 times full_attention\)"),
        ({"moe_layers": [3, 48]}, r"moe_layers = \[3, 48\] \(numbers of the 48 layers\)"),
        ({"vision_chunk": 3}, r"unsupported field in config.json: vision_chunk = 3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(MoevlmError, match=told):
        parse(**changes)


def test_chosen_experts_are_those_that_the_router_of_transformers_scores() -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.1], [-3.0, -1.0, -2.0, -9.0]])
    scores = torch.zeros(2, 4).scatter(1, torch.tensor([[0, 2], [1, 2]]), 0.3)
    model = text_model(Fields(SCOUT), ("llama4_text",))
    found, index = model.routed((scores, logits))
    np.testing.assert_array_equal(found, logits)
    assert [set(row) for row in index.tolist()] == [{0, 2}, {1, 2}]
