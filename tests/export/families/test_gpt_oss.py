"""gpt-oss as it is published: its config.json, experts whose rows take turns, in floats and in MXFP4."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.checkpoint.quantized.reader import plain_tensors
from moevlm.export.config import DecoderConfig, ModelConfig
from moevlm.export.families.base import Family
from moevlm.export.families.fields import Fields
from moevlm.export.families.text.gpt_oss import GptOss
from moevlm.export.graph.weights import read
from moevlm.export.model import load
from moevlm.export.modules.decoder import Decoder
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from moevlm.runtime.request.positions import rope_tables
from tests.support.checkpoints import refused
from tests.support.families.base import TEXT
from tests.support.quantized import mxfp4
from tests.support.tiny import edit_json, edit_tensors

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
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
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
LAYER = "model.layers.1.mlp.experts."
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "truncate": False}
TINY = {
    key: TEXT[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
}
TINY |= {"num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}
TINY |= {"sliding_window": 8, "max_position_embeddings": 512, "eos_token_id": 1}
TINY |= {"rope_parameters": YARN | {"original_max_position_embeddings": 64}}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "no biases in attention, one kv head, full layers first": {
        "attention_bias": False,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "one expert, whole steps of yarn, all clamped": {
        "num_experts_per_tok": 1,
        "rope_parameters": YARN | {"original_max_position_embeddings": 32, "truncate": True, "factor": 16.0},
        "swiglu_limit": 0.5,
        "swiglu_alpha": 1.1,
    },
    "all experts, square ones, plain rope, tied head": {
        "num_experts_per_tok": 8,
        "intermediate_size": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": True,
    },
}


def save(directory: Path, seed: int = 0, **fields: Any) -> transformers.PreTrainedModel:
    """A random model, and its checkpoint."""
    config = transformers.GptOssConfig(**TINY | fields)
    model = transformers.GptOssForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.2 * values
        elif parameter.dim() > 1 and "embed" not in name:
            values = values * 0.2 if name.endswith("_bias") else values / parameter.shape[-1] ** 0.5
        parameter.data.copy_(values)
    model.save_pretrained(directory)
    return model


def publish(plain: Path, directory: Path) -> Path:
    """The same with experts in MXFP4, as openai/gpt-oss-20b has them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(EXPERTS)]:
            parts, _ = mxfp4("_blocks", "_scales")(tensors.pop(name).mT.contiguous().numpy())
            tensors |= {name + ending: part for ending, part in parts.items()}

    shutil.copytree(plain, directory)
    edit_tensors(directory, change)
    edit_json(
        directory / "config.json", lambda config: config.update(quantization_config=PUBLISHED["quantization_config"])
    )
    return directory


class Alone(Family):
    """The text model for itself."""

    text = GptOss()
    weights = text.weights("model.", "lm_head.weight")
    router_suffix = text.router_suffix

    def translate(self, fields: Fields) -> ModelConfig:
        raise NotImplementedError


def decoder_of(values: dict[str, Any]) -> DecoderConfig:
    fields = Fields(values)
    config = GptOss().decoder(fields, fields.flag("tie_word_embeddings", False))
    fields.get("eos_token_id", None)
    fields.refuse_unread()
    return config


def decoder(directory: Path, layout: str = "auto") -> tuple[Decoder, dict[str, np.ndarray]]:
    """The canonical module of a checkpoint, and its weights."""
    with Checkpoint.open(directory) as source:
        with torch.device("meta"):
            module = Decoder(decoder_of(source.config)).eval()
        parameters = {f"decoder.{name}": tuple(p.shape) for name, p in module.named_parameters()}
        bound = Alone().bind(parameters, plain_tensors(source).tensors, layout).weights
        weights = {name.removeprefix("decoder."): weight for name, weight in bound.items()}
        load(module, weights)
        return module, {name: read(weight) for name, weight in weights.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Floats, as transformers saves them. H and I are equal, as in every published model."""
    directory = tmp_path_factory.mktemp("plain") / "checkpoint"
    save(directory, 8, intermediate_size=32)
    return directory


@pytest.fixture(scope="module")
def blocks(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(plain, tmp_path_factory.mktemp("blocks") / "checkpoint")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_canonical_pytorch_is_transformers(name: str, tmp_path: Path) -> None:
    model, ids = save(tmp_path, 3, **CONFIGURATIONS[name]), torch.arange(100) * 7 % TINY["vocab_size"]
    module, _ = decoder(tmp_path)
    positions = np.stack([np.arange(len(ids))] * 3)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
        ropes = [tuple(map(torch.from_numpy, rope_tables(positions, rope))) for rope in module.config.ropes]
        step = (torch.tensor(row, dtype=torch.int32) for row in ([0, len(ids)], [0], [[1, 2]]))
        caches = [
            [torch.zeros(3, state.kv_heads, 64, dim) for dim in (state.key_dim, state.value_dim)]
            for state in module.config.states
        ]
        found, _ = module(
            input_ids=ids,
            visual_embeds=torch.zeros(1, 32),
            deepstack_embeds=None,
            visual_index=torch.full_like(ids, -1),
            ropes=ropes,
            **dict(zip(("query_start", "context_len", "page_table"), step, strict=True)),
            visible_end=None,
            state_row=None,
            query_scale=None,
            logits_index=torch.arange(len(ids)),
            states=caches,
        )
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


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
    (_, found), stored = decoder(plain), load_file(plain / "model.safetensors")
    ours = "layers.1.feed_forward."
    for name in ("gate_up_proj", "gate_up_proj_bias"):
        gate, up = np.split(found[ours + name.replace("_proj", "")], 2, axis=1)
        theirs = stored[LAYER + name].mT if stored[LAYER + name].dim() == 3 else stored[LAYER + name]
        np.testing.assert_array_equal(gate, theirs[:, 0::2])
        np.testing.assert_array_equal(up, theirs[:, 1::2])
    np.testing.assert_array_equal(found[f"{ours}down"], stored[f"{LAYER}down_proj"].mT)
    np.testing.assert_array_equal(found[f"{ours}down_bias"], stored[f"{LAYER}down_proj_bias"])


def test_blocks_are_read_as_transformers_reads_them(blocks: Path) -> None:
    """A square matrix has the same shape either way round: the format tells."""
    quantization = transformers.Mxfp4Config(dequantize=True)
    model = transformers.GptOssForCausalLM.from_pretrained(
        blocks, dtype=torch.float32, quantization_config=quantization
    )
    _, ours = decoder(blocks)
    for i, layer in enumerate(model.model.layers):
        gate_up, down = layer.mlp.experts.gate_up_proj.mT.detach(), layer.mlp.experts.down_proj.mT.detach()
        apart = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1)
        np.testing.assert_array_equal(ours[f"layers.{i}.feed_forward.gate_up"], apart)
        np.testing.assert_array_equal(ours[f"layers.{i}.feed_forward.down"], down)


def test_experts_of_another_layout_need_the_option(tmp_path: Path) -> None:
    def turn(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensors[name].mT for name in tensors if name.endswith(EXPERTS)}

    save(tmp_path)
    _, wanted = decoder(tmp_path)
    edit_tensors(tmp_path, turn)
    refused(CheckpointError, "tensor model.layers.0.mlp.experts.gate_up_proj has shape", act=lambda: decoder(tmp_path))
    _, found = decoder(tmp_path, "out_in")
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_blocks_without_scales_are_refused_by_name(blocks: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(blocks, tmp_path / "copy"))
    edit_tensors(copy, lambda tensors: tensors.pop(f"{LAYER}down_proj_scales"))
    refused(CheckpointError, f"{LAYER}down_proj_blocks", f"lacks {LAYER}down_proj_scales", act=lambda: decoder(copy))
