"""Llama 4 as it is published: which layers rotate, see chunks and have experts, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.config import DecoderConfig, MLPConfig, MoEConfig
from moevlm.export.families import family_for
from moevlm.export.families.fields import Fields
from moevlm.export.families.text import text_model
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.errors import CheckpointError, MoevlmError
from moevlm.runtime.core.manifest import QueryScaleMetadata
from tests.support.checkpoints import canonical, refused
from tests.support.published import turn_experts
from tests.support.tiny import TinyCheckpoint, edit_tensors

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


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({"moe_layers": [3, 48, 1]}, [1, 3]),
        ({"moe_layers": [], "interleave_moe_layer_step": 0, "num_local_experts": 0, "num_experts_per_tok": 0}, []),
        ({"moe_layers": None, "interleave_moe_layer_step": 3}, [2, 5]),
        ({"interleave_moe_layer_step": 7}, []),
    ],
    ids=["by number", "none", "by step", "a step longer than the model"],
)
def test_layers_have_experts_where_transformers_has_them(changes: dict[str, Any], sparse: list[int]) -> None:
    from transformers import Llama4TextConfig

    values = {"num_hidden_layers": 6} | changes
    found = [i for i, layer in enumerate(parse(**values).layers) if isinstance(layer.feed_forward, MoEConfig)]
    theirs = Llama4TextConfig(**SCOUT | values).moe_layers
    assert found == sparse == sorted(i for i in theirs if i < 6)


def test_queries_are_scaled_where_the_config_says_so_and_some_layer_does_not_rotate() -> None:
    assert parse(attn_temperature_tuning=False).query_scale is None
    assert parse(no_rope_layers=[1] * 48).query_scale is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act = .gelu. \(supported: silu\)"),
        ({"attn_temperature_tuning": "yes"}, r"attn_temperature_tuning = .yes. \(supported: true, 4, false\)"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\] \(allowed: 48 times 0 or 1\)"),
        ({"no_rope_layers": [2] * 48}, r"\(allowed: 48 times 0 or 1\)"),
        ({"layer_types": ["sliding_attention"] * 48}, r"48 times chunked_attention or full_attention"),
        ({"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 48}, r"48 times full_attention\)"),
        ({"moe_layers": [3, -1]}, r"moe_layers = \[3, -1\] \(allowed: "),
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


# The whole family, on a tiny model that is as published: no leading "model.", experts [E, in, out].


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be left as it is."""
    return TinyCheckpoint("llama4", text={"vocab_size": 96}, seed=7).save(tmp_path_factory.mktemp("llama4") / "a")


def prefixed(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"model.{name}"] = tensors.pop(name)


def one_by_one(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".experts.gate_up_proj")]:
        base = name.removesuffix(".gate_up_proj")
        gate, up = tensors.pop(name).mT.chunk(2, 1)
        for part, experts in (("gate", gate), ("up", up), ("down", tensors.pop(f"{base}.down_proj").mT)):
            tensors |= {f"{base}.{e}.{part}_proj.weight": expert for e, expert in enumerate(experts)}


@pytest.mark.parametrize("change", [prefixed, one_by_one, turn_experts], ids=lambda change: change.__name__)
def test_every_layout_on_disk_is_one_model(change: Any, checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    names = set(Checkpoint.open(checkpoint).tensors)
    assert "language_model.model.layers.0.feed_forward.experts.gate_up_proj" in names
    assert {
        "vision_model.class_embedding",
        "multi_modal_projector.linear_1.weight",
        "language_model.lm_head.weight",
    } < names
    edit_tensors(other, change)
    ours, theirs = canonical(other), canonical(checkpoint)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_missing_and_strange_tensors_are_named(checkpoint: Path, tmp_path: Path) -> None:
    name = "language_model.model.layers.3.feed_forward.shared_expert.up_proj.weight"
    for change, told in (
        (lambda tensors: tensors.pop(name), f"the checkpoint lacks tensor {name}"),
        (
            lambda tensors: tensors.update({f"{name}_extra": torch.zeros(3)}),
            f"without a place in the model: 1 tensor of the checkpoint, first {name}_extra",
        ),
    ):
        other = Path(shutil.copytree(checkpoint, tmp_path / f"{len(told)}"))
        edit_tensors(other, change)
        refused(CheckpointError, told, act=lambda other=other: canonical(other))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("text_config.hidden_act", "gelu", "text_config.hidden_act = "),
        ("text_config.model_type", "llama", 'text_config.model_type = "llama" (supported: llama4_text)'),
        ("text_config.num_experts_per_tok", 9, "text_config.num_experts_per_tok = 9"),
        ("vision_config.pixel_shuffle_ratio", 0.3, "vision_config.pixel_shuffle_ratio = "),
        ("image_token_index", 96, "image_token_index = 96"),
        ("boi_token_index", 97, "boi_token_index = 97"),
        ("talks_backwards", 3, "unsupported field in config.json: talks_backwards = 3"),
    ],
)
def test_what_the_family_does_not_support_is_refused_by_its_whole_name(
    path: str, value: Any, told: str, checkpoint: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    *outer, key = path.split(".")
    place = config[outer[0]] if outer else config
    place[key] = value
    with pytest.raises(MoevlmError) as raised:
        family_for(config).config(config)
    assert told in str(raised.value)


def test_token_ids_may_have_the_names_of_the_attributes(checkpoint: Path) -> None:
    """image_token_id is image_token_index in transformers, and so are the ids around an image."""
    config = json.loads((checkpoint / "config.json").read_text())
    published = family_for(config).config(config)
    for name in ("image_token", "boi_token", "eoi_token"):
        config[f"{name}_id"] = config.pop(f"{name}_index")
    assert family_for(config).config(config) == published
    refused(
        CheckpointError,
        f"boi_token_id = {config['boi_token_id']} (allowed: boi_token_index = 1)",
        act=lambda: family_for(config).config(config | {"boi_token_index": 1}),
    )
