"""DeepSeek-V3, Kimi-K2 and Mistral 4 as they are published: their sizes, where their rows lie, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moevlm.export.config import DecoderConfig, MLAConfig, MLPConfig, MoEConfig
from moevlm.export.families.fields import Fields
from moevlm.export.families.names import Tensors
from moevlm.export.families.text import text_model
from moevlm.export.graph.weights import Constant, read
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.errors import CheckpointError, MoevlmError
from moevlm.runtime.core.manifest import QueryScaleMetadata
from moevlm.runtime.core.states import PagedKV

# config.json of DeepSeek-V3, as published, without its quantization_config and what names its files.
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
# What differs in the text of Kimi-K2.5.
KIMI: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "max_position_embeddings": 262144,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
# text_config of Mistral-Small-4, by the defaults of transformers, which are its sizes.
MISTRAL: dict[str, Any] = {
    "model_type": "mistral4",
    "first_k_dense_replace": 0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "kv_lora_rank": 256,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "q_lora_rank": 1024,
    "qk_head_dim": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_interleave": True,
    "rope_parameters": {
        "type": "yarn",
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 8192,
        "max_position_embeddings": 1048576,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
        "partial_rotary_factor": 0.5,
    },
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 131072,
}


def parse(config: dict[str, Any], **changes: Any) -> DecoderConfig:
    fields = Fields(config | changes)
    decoder = text_model(fields, (config["model_type"],)).decoder(fields, tied=False)
    fields.refuse_unread()
    return decoder


def test_deepseek_v3_as_published() -> None:
    decoder = parse(DEEPSEEK)
    scale = 192**-0.5 * (0.1 * np.log(40) + 1) ** 2
    mixer = decoder.layers[0].mixer
    assert mixer == MLAConfig(128, 1536, 512, 128, 64, 128, scale=mixer.scale)
    assert mixer.scale == pytest.approx(scale, rel=1e-12)
    kept = PagedKV(layer=7, kv_heads=1, key_dim=576, value_dim=512, value_in_key=True)
    assert (mixer.states(7), kept.token_bytes) == ((kept,), 4 * 576)
    assert [layer.feed_forward for layer in decoder.layers[:3]] == [MLPConfig(18432, "silu")] * 3
    router = RouterSpec(8, "sigmoid", epsilon=1e-20, scale=2.5, n_group=8, topk_group=4, group_score="top2_sum")
    moe = MoEConfig(256, 2048, router, ExpertsSpec(), correction_bias=True, shared_width=2048)
    assert {layer.feed_forward for layer in decoder.layers[3:]} == {moe}
    assert (decoder.ropes[0].dim, len(decoder.ropes[0].frequencies), decoder.ropes[0].factor) == (64, 32, 1.0)


def test_kimi_k2_as_published() -> None:
    decoder = parse(DEEPSEEK, **KIMI)
    moe = decoder.layers[1].feed_forward
    assert isinstance(moe, MoEConfig) and isinstance(decoder.layers[0].feed_forward, MLPConfig)
    assert (moe.experts, moe.router.n_group, moe.router.scale) == (384, 1, 2.827)
    assert decoder.layers[0].mixer.spec.heads == 64


def test_mistral_small_4_as_published() -> None:
    decoder = parse(MISTRAL)
    mixer, moe = decoder.layers[0].mixer, decoder.layers[0].feed_forward
    assert mixer == MLAConfig(32, 1024, 256, 64, 64, 128, scale=mixer.scale, query_scale=True)
    assert mixer.scale == pytest.approx(128**-0.5 * (0.1 * np.log(128) + 1) ** 2, rel=1e-12)
    router = RouterSpec(4, "softmax", epsilon=1e-20, group_score="top2_sum")
    assert moe == MoEConfig(128, 2048, router, ExpertsSpec(), shared_width=2048)
    assert decoder.query_scale == QueryScaleMetadata(beta=0.1, original=8192)
    assert decoder.ropes[0].dim == 64


@pytest.mark.parametrize(
    ("config", "changes", "told"),
    [
        (DEEPSEEK, {"scoring_func": "softmax"}, r"scoring_func = .softmax. \(supported: sigmoid\)"),
        (DEEPSEEK, {"topk_method": "greedy"}, r"topk_method = .greedy. \(supported: noaux_tc\)"),
        (DEEPSEEK, {"moe_layer_freq": 2}, r"moe_layer_freq = 2 \(supported: 1\)"),
        (DEEPSEEK, {"num_key_value_heads": 8}, r"num_key_value_heads = 8 \(supported: 128\)"),
        (DEEPSEEK, {"n_group": 7}, r"n_group = 7 \(allowed: a divisor of the 256 experts up to 128\)"),
        (DEEPSEEK, {"n_routed_experts": 1}, r"n_routed_experts = 1 \(allowed: 2 or more\)"),
        (DEEPSEEK, {"hidden_act": "gelu"}, r"hidden_act = .gelu. \(supported: silu\)"),
        (DEEPSEEK, {"head_dim": 128}, r"head_dim = 128 \(supported: 64\)"),
        (DEEPSEEK, {"qk_rope_head_dim": 7}, r"qk_rope_head_dim = 7 \(allowed: an even number\)"),
        (DEEPSEEK, {"index_topk": 2048}, r"unsupported field in config.json: index_topk = 2048"),
        (MISTRAL, {"qk_head_dim": 64}, r"qk_head_dim = 64 \(supported: 128\)"),
        (MISTRAL, {"head_dim": 64}, r"head_dim = 64 \(supported: 128\)"),
        (
            MISTRAL,
            {"rope_parameters": MISTRAL["rope_parameters"] | {"partial_rotary_factor": 1.0}},
            r"partial_rotary_factor = 1.0 \(supported: 0.5\)",
        ),
        (
            MISTRAL,
            {"rope_parameters": MISTRAL["rope_parameters"] | {"llama_4_scaling_beta": None}},
            r"lacks rope_parameters.llama_4_scaling_beta",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(MoevlmError, match=told):
        parse(config, **changes)


SIZES = {"num_attention_heads": 2, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 2, "kv_lora_rank": 5}


def source(name: str, shape: tuple[int, ...], *, interleaved: bool, **on_disk: np.ndarray) -> np.ndarray:
    text = text_model(Fields(DEEPSEEK | SIZES | {"rope_interleave": interleaved}), ("deepseek_v3",))
    found = text.weights("model.", "lm_head.weight")[f"decoder.layers.{{i}}.attention.{name}"]
    tensors = Tensors({f"model.layers.0.self_attn.{key}.weight": Constant(array) for key, array in on_disk.items()})
    if isinstance(found, str):
        return read(tensors[found.format(i=0)])
    return read(found(tensors, {"i": "0"}, shape, "auto"))


def numbered(rows: int, columns: int) -> np.ndarray:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_that_turn_are_halves(interleaved: bool) -> None:
    order = [0, 2, 1, 3] if interleaved else [0, 1, 2, 3]
    q = numbered(14, 6)
    found = source("q_up.weight", (14, 6), interleaved=interleaved, q_b_proj=q)
    turning = [3 + i for i in order]
    np.testing.assert_array_equal(found, q[[0, 1, 2, *turning, 7, 8, 9, *(7 + i for i in turning)]])
    down = numbered(9, 6)
    found = source("kv_down.weight", (9, 6), interleaved=interleaved, kv_a_proj_with_mqa=down)
    np.testing.assert_array_equal(found, down[[*range(5), *(5 + i for i in order)]])


def test_keys_and_values_of_heads_come_apart() -> None:
    up = numbered(2 * (3 + 2), 5)
    heads = up.reshape(2, 5, 5)
    found = source("key_up", (2, 5, 3), interleaved=True, kv_b_proj=up)
    np.testing.assert_array_equal(found, heads[:, :3].swapaxes(1, 2))
    found = source("value_up", (2, 2, 5), interleaved=True, kv_b_proj=up)
    np.testing.assert_array_equal(found, heads[:, 3:])
    told = r"kv_b_proj.weight has shape \[9, 5\], the config asks for \[10, 5\]"
    with pytest.raises(CheckpointError, match=told):
        source("key_up", (2, 5, 3), interleaved=True, kv_b_proj=up[:9])
