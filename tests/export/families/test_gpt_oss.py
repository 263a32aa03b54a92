"""gpt-oss as it is published: its config.json, experts whose rows take turns, in floats and in MXFP4."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from moevlm.export.build import build
from moevlm.export.config import DecoderConfig
from moevlm.export.families import family_for
from moevlm.export.parity.run import check_parity
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from tests.support.checkpoints import canonical, refused
from tests.support.families.gpt_oss import EXPERTS, QUANTIZED, publish
from tests.support.tiny import TinyCheckpoint, edit_tensors

# openai/gpt-oss-20b, config.json
PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": QUANTIZED,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
LAYER, OURS = "model.layers.1.mlp.experts.", "decoder.layers.1.feed_forward."


def decoder_of(values: dict[str, Any]) -> DecoderConfig:
    return family_for(values).config(values).decoder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Floats, as transformers saves them. H and I are equal, as in every published model."""
    tiny = TinyCheckpoint("gpt_oss", text={"intermediate_size": 32}, seed=8)
    return tiny.save(tmp_path_factory.mktemp("plain") / "checkpoint")


@pytest.fixture(scope="module")
def blocks(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(plain, tmp_path_factory.mktemp("blocks") / "checkpoint")


def test_published_config_is_what_transformers_makes_of_it() -> None:
    config = decoder_of(PUBLISHED)
    assert decoder_of(transformers.GptOssConfig(**PUBLISHED).to_dict()) == config
    assert [layer.mixer.metadata().window for layer in config.layers] == [128, 0] * 12


def test_fields_that_config_json_does_not_have_are_transformers_own() -> None:
    usual = ("rope_scaling", "rope_theta", "layer_types", "swiglu_limit", "sliding_window", "head_dim", "rms_norm_eps")
    few = {key: value for key, value in PUBLISHED.items() if key not in (*usual, "attention_bias")}
    assert decoder_of(few) == decoder_of(transformers.GptOssConfig(**few).to_dict()) == decoder_of(PUBLISHED)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"experts_per_token": 2}, "experts_per_token = 2 (supported: 4)"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu" (supported: silu)'),
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types = "),
        ({"num_hash_layers": 2}, "num_hash_layers = 2"),
    ],
    ids=["experts_per_token", "hidden_act", "layer_types", "unknown"],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], told: str) -> None:
    refused(UnsupportedModelError, told, act=lambda: decoder_of(PUBLISHED | change))


def test_gate_and_up_come_apart(plain: Path) -> None:
    found, stored = canonical(plain), load_file(plain / "model.safetensors")
    for name in ("gate_up_proj", "gate_up_proj_bias"):
        gate, up = np.split(found[OURS + name.replace("_proj", "")], 2, axis=1)
        theirs = stored[LAYER + name].mT if stored[LAYER + name].dim() == 3 else stored[LAYER + name]
        np.testing.assert_array_equal(gate, theirs[:, 0::2])
        np.testing.assert_array_equal(up, theirs[:, 1::2])
    np.testing.assert_array_equal(found[f"{OURS}down"], stored[f"{LAYER}down_proj"].mT)
    np.testing.assert_array_equal(found[f"{OURS}down_bias"], stored[f"{LAYER}down_proj_bias"])


def test_blocks_are_read_as_transformers_reads_them(blocks: Path) -> None:
    """A square matrix has the same shape either way round: the format tells."""
    quantization = transformers.Mxfp4Config(dequantize=True)
    model = transformers.GptOssForCausalLM.from_pretrained(
        blocks, dtype=torch.float32, quantization_config=quantization
    )
    ours = canonical(blocks)
    for i, layer in enumerate(model.model.layers):
        gate_up, down = layer.mlp.experts.gate_up_proj.mT.detach(), layer.mlp.experts.down_proj.mT.detach()
        apart = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1)
        np.testing.assert_array_equal(ours[f"decoder.layers.{i}.feed_forward.gate_up"], apart)
        np.testing.assert_array_equal(ours[f"decoder.layers.{i}.feed_forward.down"], down)


def test_bundle_of_blocks_passes_parity(blocks: Path, tmp_path: Path) -> None:
    bundle = build(blocks, tmp_path / "b", ["reference", "cpu:int8"])
    assert bundle.manifest.stored_as["mxfp4"] == 4
    engine = bundle.manifest.engines["cpu:int8"]
    assert (engine.recoded, engine.weight_errors) == ({"fp4 kept": 4}, {})
    assert check_parity(bundle.directory, blocks, quick=True).passed


def test_experts_of_another_layout_need_the_option(tmp_path: Path) -> None:
    def turn(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensors[name].mT for name in tensors if name.endswith(EXPERTS)}

    checkpoint = TinyCheckpoint("gpt_oss").save(tmp_path / "checkpoint")
    wanted = canonical(checkpoint)
    edit_tensors(checkpoint, turn)
    told = "tensor model.layers.0.mlp.experts.gate_up_proj has shape"
    refused(CheckpointError, told, act=lambda: canonical(checkpoint))
    found = canonical(checkpoint, "out_in")
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_blocks_without_scales_are_refused_by_name(blocks: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(blocks, tmp_path / "copy"))
    edit_tensors(copy, lambda tensors: tensors.pop(f"{LAYER}down_proj_scales"))
    refused(CheckpointError, f"{LAYER}down_proj_blocks", f"lacks {LAYER}down_proj_scales", act=lambda: canonical(copy))
