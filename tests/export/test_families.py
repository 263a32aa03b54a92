"""config.json and tensor names to the canonical model: every layout on disk, one line for what is not understood."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moevlm.export.checkpoint import Checkpoint
from moevlm.export.config import ModelConfig, MoEConfig
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.export.weights import read
from moevlm.runtime.errors import CheckpointError, MoevlmError, UnsupportedModelError
from tests.tiny import TinyCheckpoint, edit_json, edit_tensors, old_rope, swap_experts

FAMILIES = ("qwen3_vl_moe", "glm4v_moe")
families = pytest.mark.parametrize("model_type", FAMILIES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per family, to be left as it is."""
    root = tmp_path_factory.mktemp("saved")
    return {name: TinyCheckpoint(name).save(root / name) for name in FAMILIES}


def canonical(directory: Path, layout: str = "auto") -> dict[str, np.ndarray]:
    with Checkpoint.open(directory) as checkpoint:
        model = CanonicalModel.of(checkpoint, layout)
    return {
        f"{tower}.{name}": read(weight)
        for tower, weights in (("vision", model.vision_weights), ("decoder", model.decoder_weights))
        for name, weight in weights.items()
    }


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def parse(saved: Path, **changes: Any) -> ModelConfig:
    """The canonical config of `saved` with fields changed: text_config={"n_group": 3}; REMOVED takes a field away."""
    config = json.loads((saved / "config.json").read_text())
    return family_for(config).config(merge(config, changes))


REMOVED = object()


def merge(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for key, value in changes.items():
        if value is REMOVED:
            config.pop(key)
        else:
            config[key] = merge(config.get(key) or {}, value) if isinstance(value, dict) else value
    return config


def refused(kind: type[MoevlmError], *words: str, act: Callable[[], Any]) -> None:
    """`act` raises exactly `kind`, in one line that has all the words."""
    with pytest.raises(kind) as raised:
        act()
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# Weights


@pytest.mark.parametrize(
    "options",
    [{"hub": True}, {"shard_size": "20KB"}, {"hub": True, "shard_size": "20KB"}],
    ids=["as on the hub", "shards", "as on the hub, in shards"],
)
def test_qwen_layouts_on_disk_are_one_canonical_model(
    options: dict[str, Any], saved: dict[str, Path], save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(**options)
    assert (len(list(directory.glob("*.safetensors"))) > 2) == ("shard_size" in options)
    assert_same(canonical(directory), canonical(saved["qwen3_vl_moe"]))


def test_glm_shards_are_one_canonical_model(saved: dict[str, Path], save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type="glm4v_moe", shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert_same(canonical(directory), canonical(saved["glm4v_moe"]))


@families
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_widened_value_by_value(
    dtype: str, model_type: str, saved: dict[str, Path], save_checkpoint: Callable[..., Path]
) -> None:
    wide = canonical(saved[model_type])
    rounded = {name: torch.from_numpy(a).to(getattr(torch, dtype)).float().numpy() for name, a in wide.items()}
    directory = save_checkpoint(model_type=model_type, dtype=dtype)
    if model_type == "glm4v_moe":  # on the hub this one is float32 among half precision
        ours, theirs = "decoder.layers.1.feed_forward.correction_bias", "layers.1.mlp.gate.e_score_correction_bias"
        assert not np.array_equal(rounded[ours], wide[ours])
        rounded[ours] = wide[ours]
        bias = {f"model.language_model.{theirs}": torch.from_numpy(wide[ours])}
        edit_tensors(directory, lambda tensors: tensors.update(bias))
    assert_same(canonical(directory), rounded)


def test_gate_rows_come_before_up_rows(saved: dict[str, Path]) -> None:
    """Hugging Face's own module on the same tensors says which half is which."""
    from transformers import AutoModelForImageTextToText

    for name, directory in saved.items():
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
        experts = model.model.language_model.layers[1].mlp.experts
        weights = canonical(directory)
        for part in ("gate_up", "down"):
            np.testing.assert_array_equal(
                weights[f"decoder.layers.1.feed_forward.{part}"],
                getattr(experts, f"{part}_proj").detach().numpy(),
                err_msg=name,
            )


# 2 * moe_intermediate_size == hidden_size makes gate_up square, moe_intermediate_size == hidden_size makes down square.
SQUARE = {"gate_up": {"moe_intermediate_size": 16}, "down": {"moe_intermediate_size": 32}}
squares = pytest.mark.parametrize("square", SQUARE)


@squares
def test_square_experts_of_a_fresh_save_are_read_as_their_sibling_lies(
    square: str, save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(text=SQUARE[square])
    assert_same(canonical(directory), canonical(directory, "out_in"))


@squares
def test_square_experts_as_on_the_hub_are_refused_until_the_option_says(
    square: str, save_checkpoint: Callable[..., Path]
) -> None:
    fresh, hub = save_checkpoint(text=SQUARE[square]), save_checkpoint(text=SQUARE[square], hub=True)
    refused(
        CheckpointError,
        f"layers.0.mlp.experts.{square}_proj is square",
        "--expert-layout out_in or in_out",
        act=lambda: canonical(hub),
    )
    assert_same(canonical(hub, "in_out"), canonical(fresh))
    refused(CheckpointError, "has shape", "the config asks for", act=lambda: canonical(hub, "out_in"))
    refused(CheckpointError, "has shape", "the config asks for", act=lambda: canonical(fresh, "in_out"))


def test_layout_option_is_one_of_three(saved: dict[str, Path]) -> None:
    refused(
        CheckpointError,
        'expert_layout = "sideways"',
        "auto, out_in, in_out",
        act=lambda: canonical(saved["qwen3_vl_moe"], "sideways"),
    )


A_TENSOR = {
    "qwen3_vl_moe": ["lm_head.weight", "model.language_model.layers.1.mlp.experts.down_proj", "model.visual.pos_embed"],
    "glm4v_moe": [
        "model.language_model.layers.1.mlp.gate.e_score",
        "layers.1.mlp.experts.7.up_proj",
        "downsample.bias",
    ],
}
CASES = [(family, name) for family, names in A_TENSOR.items() for name in names]


@pytest.mark.parametrize(("model_type", "part"), CASES)
def test_missing_tensor_is_named(model_type: str, part: str, save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type=model_type)
    removed = []

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        removed.extend(name for name in tensors if part in name)
        for name in removed:
            tensors.pop(name)

    edit_tensors(directory, remove)
    assert len(removed) == 1
    refused(CheckpointError, f"the checkpoint lacks tensor {removed[0]}", act=lambda: canonical(directory))


@pytest.mark.parametrize(("model_type", "part"), CASES)
def test_tensor_of_another_shape_is_named_with_both_shapes(
    model_type: str, part: str, save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(model_type=model_type)
    changed = []

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name] = tensors[name][:-1]
            changed.append((name, tensors[name].shape))

    edit_tensors(directory, shorten)
    ((name, shape),) = changed
    refused(
        CheckpointError,
        f"tensor {name} has shape {list(shape)}, the config asks for",
        act=lambda: canonical(directory),
    )


def test_gate_and_up_rows_of_one_expert_are_of_equal_number(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type="glm4v_moe")
    expert = "model.language_model.layers.1.mlp.experts.3."

    def move_two_rows(tensors: dict[str, torch.Tensor]) -> None:
        rows = torch.cat([tensors[f"{expert}gate_proj.weight"], tensors[f"{expert}up_proj.weight"]])
        tensors[f"{expert}gate_proj.weight"], tensors[f"{expert}up_proj.weight"] = rows[:22], rows[22:]

    edit_tensors(directory, move_two_rows)
    refused(
        CheckpointError,
        f"tensor {expert}gate_proj.weight has shape [22, 32], the config asks for [24, 32]",
        act=lambda: canonical(directory),
    )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_vl_moe", "model.visual.patch_embed.proj.weight"),
        ("qwen3_vl_moe", "model.language_model.layers.0.mlp.experts.gate_up_proj"),
        ("glm4v_moe", "model.visual.downsample.weight"),
        ("glm4v_moe", "model.language_model.layers.1.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_tensor_of_another_rank_is_refused_by_name(
    model_type: str, name: str, rank: int, save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(model_type=model_type)
    flat = torch.zeros(()) if rank == 0 else torch.zeros(7, 5)
    edit_tensors(directory, lambda tensors: tensors.update({name: flat}))
    refused(CheckpointError, f"tensor {name} has shape {list(flat.shape)}", act=lambda: canonical(directory))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "bool"])
@pytest.mark.parametrize(("model_type", "part"), CASES)
def test_quantized_tensor_is_refused_by_name_and_dtype(
    model_type: str, part: str, dtype: str, save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(model_type=model_type)
    changed = []

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        changed.extend(name for name in tensors if part in name)
        for name in changed:
            tensors[name] = tensors[name].to(getattr(torch, dtype))

    edit_tensors(directory, quantize)
    refused(
        CheckpointError,
        f"tensor {changed[0]} has dtype {dtype}",
        "supported: bfloat16, float16, float32, float64",
        act=lambda: canonical(directory),
    )


@families
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_tied_head_that_is_stored_again_equals_the_embedding_or_is_refused(
    stored: str, model_type: str, save_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moevlm.export.weights.SLICE_BYTES", 1000)  # several slices
    directory = save_checkpoint(model_type=model_type, top={"tie_word_embeddings": True}, dtype="bfloat16")
    alone = canonical(directory)

    def add(change: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            head = tensors["model.language_model.embed_tokens.weight"].to(getattr(torch, stored), copy=True)
            head[-1, -1] += change
            tensors["lm_head.weight"] = head

        return edit

    edit_tensors(directory, add(0))
    assert_same(canonical(directory), alone)
    edit_tensors(directory, add(1))
    refused(
        CheckpointError,
        "tensor lm_head.weight differs from the embedding",
        "tie_word_embeddings",
        act=lambda: canonical(directory),
    )


def test_layers_beyond_the_models_are_not_hidden(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type="glm4v_moe")
    extra = "model.language_model.layers.46.input_layernorm.weight"
    edit_tensors(directory, lambda tensors: tensors.update({extra: torch.zeros(32)}))
    refused(CheckpointError, "have no place", extra, act=lambda: canonical(directory))


@families
def test_tensor_without_a_place_is_refused_by_name(model_type: str, save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type=model_type)
    extra = "model.language_model.layers.0.self_attn.sinks"
    edit_tensors(directory, lambda tensors: tensors.update({extra: torch.zeros(4)}))
    refused(CheckpointError, "1 tensors of the checkpoint have no place", extra, act=lambda: canonical(directory))


def test_correction_biases_and_norms_are_not_mixed_up(saved: dict[str, Path]) -> None:
    """Tensors of one shape cannot be told apart by shape: each has the value that is stored under its own name."""
    with Checkpoint.open(saved["glm4v_moe"]) as checkpoint:
        tensors = {name: read(weight) for name, weight in checkpoint.tensors.items()}
    weights, layer = canonical(saved["glm4v_moe"]), "model.language_model.layers.1."
    for ours, theirs in {
        "attention_norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
        "attention.k.weight": "self_attn.k_proj.weight",
        "attention.v.bias": "self_attn.v_proj.bias",
        "feed_forward.correction_bias": "mlp.gate.e_score_correction_bias",
        "feed_forward.shared.gate.weight": "mlp.shared_experts.gate_proj.weight",
        "feed_forward.shared.up.weight": "mlp.shared_experts.up_proj.weight",
    }.items():
        np.testing.assert_array_equal(weights[f"decoder.layers.1.{ours}"], tensors[layer + theirs])


# config.json


@pytest.mark.parametrize("model_type", ["llama", None, "qwen3_vl_moe_text"])
def test_unsupported_model_type_lists_the_supported(model_type: str | None) -> None:
    config = {} if model_type is None else {"model_type": model_type}
    refused(
        UnsupportedModelError,
        f'model_type = "{model_type}"',
        "supported: glm4v_moe, qwen3_vl_moe",
        act=lambda: family_for(config),
    )


CHOICES = [
    ("qwen3_vl_moe", "text_config.hidden_act", "gelu", "silu"),
    ("qwen3_vl_moe", "text_config.norm_topk_prob", False, "true"),
    ("qwen3_vl_moe", "text_config.use_sliding_window", True, "false"),
    ("qwen3_vl_moe", "text_config.rope_parameters.rope_type", "yarn", "default"),
    ("qwen3_vl_moe", "text_config.rope_parameters.rope_type", "mrope", "default"),
    ("qwen3_vl_moe", "text_config.rope_parameters.partial_rotary_factor", 0.5, "1.0"),
    ("qwen3_vl_moe", "text_config.partial_rotary_factor", 0.5, "1.0"),
    ("qwen3_vl_moe", "text_config.rope_theta", 5000000, "10000.0"),
    ("qwen3_vl_moe", "text_config.rope_parameters.mrope_interleaved", False, "true"),
    ("qwen3_vl_moe", "vision_config.hidden_act", "relu2", "gelu_pytorch_tanh, gelu, silu"),
    ("qwen3_vl_moe", "vision_config.rope_parameters.rope_type", "linear", "axial, default"),
    ("glm4v_moe", "text_config.hidden_act", ["silu"], "silu"),
    ("glm4v_moe", "text_config.use_qk_norm", True, "false"),
    ("glm4v_moe", "text_config.rope_parameters.rope_type", "dynamic", "default"),
    ("glm4v_moe", "text_config.rope_parameters.mrope_interleaved", True, "false"),
    ("glm4v_moe", "vision_config.hidden_act", "gelu", "silu"),
    ("glm4v_moe", "vision_config.rope_parameters.rope_type", "yarn", "axial, default"),
]


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize(("model_type", "path", "value", "allowed"), CHOICES)
def test_unsupported_value_names_the_field_and_what_is_supported(
    model_type: str, path: str, value: Any, allowed: str, saved: dict[str, Path]
) -> None:
    refused(
        UnsupportedModelError,
        f"unsupported value in config.json: {path} = ",
        f"(supported: {allowed})",
        act=lambda: parse(saved[model_type], **nested(path, value)),
    )


def test_every_choice_is_listed_here() -> None:
    """A new `choice` without its line above fails this test."""
    folder = Path(__file__).parents[2] / "export" / "families"
    made = sum(path.read_text().count(".choice(") for path in folder.glob("*.py"))
    listed = [path for _, path, _, _ in CHOICES]
    in_rope = {path.split(".")[-1] for path in listed if re.search("rope|rotary", path)}  # one file for all families
    elsewhere = [path for path in listed if not re.search("rope|rotary", path)]
    assert made == len(in_rope) + len(elsewhere)


@families
@pytest.mark.parametrize("types", [["sliding_attention", "full_attention"], ["full_attention"], "full_attention"])
def test_layer_types_other_than_full_attention_everywhere_are_refused(
    types: Any, model_type: str, saved: dict[str, Path]
) -> None:
    refused(
        UnsupportedModelError,
        f"text_config.layer_types = {types!r} (supported: 2 times full_attention)",
        act=lambda: parse(saved[model_type], text_config={"layer_types": types}),
    )


UNKNOWN = [
    ("text_config.attn_logit_softcapping", 30.0),
    ("text_config.rope_parameters.factor", 4.0),
    ("vision_config.window_size", 112),
    ("quantization_config", {"quant_method": "fp8"}),
    ("moe_layer_freq", [0, 1]),
]


@families
@pytest.mark.parametrize(("path", "value"), UNKNOWN)
def test_unknown_field_with_a_value_is_refused_by_its_dotted_name(
    path: str, value: Any, model_type: str, saved: dict[str, Path]
) -> None:
    refused(
        UnsupportedModelError,
        f"unsupported field in config.json: {path} = ",
        act=lambda: parse(saved[model_type], **nested(path, value)),
    )


@families
@pytest.mark.parametrize("value", [None, False, [], {}], ids=str)
def test_unknown_field_that_is_off_passes(value: Any, model_type: str, saved: dict[str, Path]) -> None:
    config = json.loads((saved[model_type] / "config.json").read_text())
    config["text_config"]["attn_logit_softcapping"] = config["moe_layer_freq"] = value
    assert family_for(config).config(config) == parse(saved[model_type])


@families
def test_harmless_fields_change_nothing(model_type: str, saved: dict[str, Path]) -> None:
    harmless = {"torch_dtype": "bfloat16", "transformers_version": "4.57.0", "use_cache": False, "dtype": "float16"}
    changed = parse(saved[model_type], **harmless, text_config=harmless, vision_config={"initializer_range": 0.5})
    assert changed == parse(saved[model_type])


EQUIVALENT = [
    ("qwen3_vl_moe", {"text_config": {"num_experts": 8, "num_local_experts": 8}}),
    ("qwen3_vl_moe", {"text_config": {"num_experts": 8, "num_local_experts": REMOVED}}),
    ("qwen3_vl_moe", {"text_config": {"partial_rotary_factor": 1, "rope_parameters": {"partial_rotary_factor": None}}}),
    ("qwen3_vl_moe", {"text_config": {"layer_types": ["full_attention"] * 2}}),
    ("qwen3_vl_moe", {"text_config": {"rope_theta": 10000}}),
    ("qwen3_vl_moe", {"text_config": {"rope_theta": 1e4, "rope_parameters": {"rope_theta": REMOVED}}}),
    ("qwen3_vl_moe", {"text_config": {"rope_parameters": {"rope_type": REMOVED, "type": "default"}}}),
    ("qwen3_vl_moe", {"text_config": {"rope_parameters": {"type": "mrope"}}}),
    ("qwen3_vl_moe", {"vision_config": {"rope_parameters": {"rope_type": "default"}}}),
    ("qwen3_vl_moe", {"eos_token_id": [2, 0]}),
    ("glm4v_moe", {"text_config": {"num_local_experts": 8}}),
    ("glm4v_moe", {"text_config": {"num_local_experts": 8, "n_routed_experts": REMOVED}}),
    ("glm4v_moe", {"text_config": {"rope_parameters": {"partial_rotary_factor": REMOVED}}}),
    ("glm4v_moe", {"text_config": {"layer_types": ["full_attention"] * 2}}),
    ("glm4v_moe", {"text_config": {"rope_theta": 10000.0}}),
    ("glm4v_moe", {"vision_config": {"rope_parameters": {"rope_type": REMOVED, "type": "default"}}}),
    ("glm4v_moe", {"eos_token_id": [2, 0]}),
]


@pytest.mark.parametrize(("model_type", "changes"), EQUIVALENT)
def test_other_spellings_of_one_model_are_read_as_transformers_reads_them(
    model_type: str, changes: dict[str, Any], saved: dict[str, Path]
) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    given = json.loads((saved[model_type] / "config.json").read_text())
    assert parse(saved[model_type], **changes) == parse(saved[model_type])
    models = []
    for values in (given, merge(given, changes)):
        with torch.device("meta"):
            models.append(AutoModelForImageTextToText.from_config(AutoConfig.for_model(**values)))
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models]
    rotated = [model.model.language_model.rotary_emb.inv_freq.shape for model in models]
    assert (shapes[0], rotated[0]) == (shapes[1], rotated[1])


@families
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_mrope_is_no_rope_type_here_or_in_transformers(
    name: str, place: str, model_type: str, saved: dict[str, Path]
) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = json.loads((saved[model_type] / "config.json").read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    del rope["rope_type"]
    text |= {place: rope | {name: "mrope"}, "rope_theta": rope["rope_theta"]}
    refused(
        UnsupportedModelError,
        f'text_config.{place}.{name} = "mrope" (supported: default)',
        act=lambda: family_for(config).config(config),
    )
    with torch.device("meta"), pytest.raises(KeyError, match="mrope"):
        AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))


HUB_ROPE = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}


def test_rope_scaling_as_on_the_hub_equals_rope_parameters(saved: dict[str, Path]) -> None:
    new = parse(
        saved["qwen3_vl_moe"], text_config={"head_dim": 128, "rope_parameters": HUB_ROPE | {"rope_theta": 5000000}}
    )
    old = parse(
        saved["qwen3_vl_moe"],
        text_config={
            "head_dim": 128,
            "rope_parameters": REMOVED,
            "rope_scaling": HUB_ROPE,
            "rope_theta": 5000000,
            "norm_topk_prob": True,
            "num_local_experts": REMOVED,
            "num_experts": 8,
        },
        vision_config={"rope_parameters": REMOVED},
    )
    assert old == new
    assert (new.decoder.rope.theta, new.decoder.rope.sections) == (5e6, (24, 20, 20))
    assert new.decoder.rope.interleaved


def test_glm_rope_scaling_as_on_the_hub_equals_rope_parameters(saved: dict[str, Path]) -> None:
    old = parse(
        saved["glm4v_moe"],
        text_config={
            "rope_parameters": REMOVED,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        vision_config={"rope_parameters": REMOVED},
    )
    assert old == parse(saved["glm4v_moe"])
    assert old.decoder.rope.dim == old.decoder.attention.rotary_dim == 8


def test_decoder_rotates_as_many_dimensions_as_its_rope_has(saved: dict[str, Path]) -> None:
    decoder = parse(saved["glm4v_moe"]).decoder
    with pytest.raises(ValueError, match=r"rotary_dim = 8 \(allowed: rope.dim = 16\)"):
        dataclasses.replace(decoder, rope=parse(saved["qwen3_vl_moe"]).decoder.rope)


WRONG = [
    (
        "qwen3_vl_moe",
        "text_config.rope_parameters.mrope_section",
        [4, 4, 4],
        "rope_parameters.mrope_section = [4, 4, 4]",
    ),
    ("qwen3_vl_moe", "text_config.rope_parameters.mrope_section", [8], "add up to 8"),
    ("qwen3_vl_moe", "text_config.rope_parameters.mrope_section", 8, "mrope_section = 8 (a list of integers)"),
    ("qwen3_vl_moe", "text_config.rope_parameters.rope_theta", "big", "rope_theta = 'big' (a positive number)"),
    ("qwen3_vl_moe", "text_config.num_experts_per_tok", 9, "text_config.num_experts_per_tok = 9"),
    ("qwen3_vl_moe", "text_config.num_experts_per_tok", 0, "num_experts_per_tok = 0 (a positive integer)"),
    ("qwen3_vl_moe", "text_config.hidden_size", "32", "hidden_size = '32' (a positive integer)"),
    ("qwen3_vl_moe", "text_config.vocab_size", None, "lacks text_config.vocab_size"),
    (
        "qwen3_vl_moe",
        "text_config.num_key_value_heads",
        3,
        "num_key_value_heads = 3 (allowed: a divisor of the 4 heads)",
    ),
    ("qwen3_vl_moe", "text_config", {"hidden_size": 3, "head_dim": None}, "text_config.head_dim = 0 (a positive"),
    ("qwen3_vl_moe", "text_config.head_dim", 7, "text_config.head_dim = 7 (7 of its dimensions rotate"),
    ("qwen3_vl_moe", "text_config.num_experts", 4, "text_config.num_local_experts = 8 (text_config.num_experts = 4)"),
    ("qwen3_vl_moe", "text_config.mlp_only_layers", 1, "mlp_only_layers = 1 (a list of integers)"),
    ("qwen3_vl_moe", "text_config.rms_norm_eps", "tiny", "rms_norm_eps = 'tiny'"),
    ("qwen3_vl_moe", "text_config.attention_bias", "yes", "attention_bias = 'yes' (true or false)"),
    ("qwen3_vl_moe", "text_config.eos_token_id", ["a"], "eos_token_id = ['a']"),
    ("qwen3_vl_moe", "text_config", None, "lacks text_config"),
    ("qwen3_vl_moe", "image_token_id", None, "lacks image_token_id"),
    ("qwen3_vl_moe", "image_token_id", "5", "image_token_id = '5'"),
    ("qwen3_vl_moe", "image_token_id", 263, "image_token_id = 263 (allowed: up to 262)"),
    ("qwen3_vl_moe", "vision_config", 7, "vision_config = 7 (an object)"),
    ("qwen3_vl_moe", "vision_config.num_position_embeddings", 26, "= 26 (a square number)"),
    ("qwen3_vl_moe", "vision_config.num_heads", 3, "vision_config.num_heads = 3"),
    ("qwen3_vl_moe", "vision_config.num_heads", 8, "vision_config.num_heads = 8"),
    ("qwen3_vl_moe", "vision_config.deepstack_visual_indexes", [0, 5], "indexes = [0, 5] (allowed: some of 0 to 1)"),
    ("qwen3_vl_moe", "vision_config.deepstack_visual_indexes", [0, 1, 0], "_visual_indexes = [0, 1, 0]"),
    (
        "qwen3_vl_moe",
        "text_config.num_hidden_layers",
        1,
        "vision_config.deepstack_visual_indexes = [0, 1] (allowed: at most 1",
    ),
    ("qwen3_vl_moe", "vision_config.out_hidden_size", 48, "vision_config.out_hidden_size = 48 (allowed: 32)"),
    ("glm4v_moe", "text_config.n_group", 3, "text_config.n_group = 3 (1, or a divisor of the 8 experts up to 4)"),
    ("glm4v_moe", "text_config.n_group", 8, "text_config.n_group = 8 (1, or a divisor of the 8 experts up to 4)"),
    ("glm4v_moe", "text_config.num_local_experts", 4, "num_local_experts = 4 (text_config.n_routed_experts = 8)"),
    ("glm4v_moe", "text_config.topk_group", 3, "text_config.topk_group = 3 (allowed: 1 to n_group = 2)"),
    ("glm4v_moe", "text_config.num_experts_per_tok", 5, "text_config.num_experts_per_tok = 5"),
    ("glm4v_moe", "text_config.routed_scaling_factor", -1.0, "routed_scaling_factor = -1.0 (a positive number)"),
    ("glm4v_moe", "text_config.first_k_dense_replace", "one", "first_k_dense_replace = 'one'"),
    ("glm4v_moe", "text_config.rope_parameters.partial_rotary_factor", 0.25, "add up to 2"),
    ("glm4v_moe", "text_config.rope_parameters.partial_rotary_factor", 1.5, "head_dim = 16 (24 of its dimensions"),
    ("glm4v_moe", "vision_config.num_heads", 5, "vision_config.num_heads = 5"),
]


@pytest.mark.parametrize(("model_type", "path", "value", "words"), WRONG)
def test_impossible_config_is_one_line_about_the_field(
    model_type: str, path: str, value: Any, words: str, saved: dict[str, Path]
) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as raised:
        parse(saved[model_type], **nested(path, value))
    message = str(raised.value)
    assert words in message
    assert "config.json" in message
    assert "\n" not in message


@families
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_head_is_tied_where_transformers_ties_it(
    outer: bool, inner: bool, model_type: str, save_checkpoint: Callable[..., Path]
) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    tied = {"tie_word_embeddings": inner}
    directory = save_checkpoint(model_type=model_type, text=tied, top={"tie_word_embeddings": outer})

    def set_fields(config: dict[str, Any]) -> None:  # as given, whatever transformers has made of it
        config["tie_word_embeddings"] = outer
        config["text_config"] |= tied

    edit_json(directory / "config.json", set_fields)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(directory))
    expected = model.lm_head.weight is model.get_input_embeddings().weight
    assert parse(directory).decoder.tied_head == expected
    assert ("decoder.head" in canonical(directory)) != expected


def test_which_layers_are_sparse(saved: dict[str, Path]) -> None:
    def sparse(model_type: str, **text: Any) -> list[int]:
        layers = parse(saved[model_type], text_config={"num_hidden_layers": 6} | text).decoder.feed_forward
        return [i for i, layer in enumerate(layers) if isinstance(layer, MoEConfig)]

    assert sparse("qwen3_vl_moe") == [0, 1, 2, 3, 4, 5]
    assert sparse("qwen3_vl_moe", decoder_sparse_step=3) == [2, 5]
    assert sparse("qwen3_vl_moe", decoder_sparse_step=2, mlp_only_layers=[3]) == [1, 5]
    assert sparse("glm4v_moe", first_k_dense_replace=4) == [4, 5]


def test_eos_token_may_be_one_several_or_none(saved: dict[str, Path]) -> None:
    for given, expected in ((7, (7,)), ([7, 8], (7, 8)), (None, ())):
        for directory in saved.values():
            assert parse(directory, text_config={"eos_token_id": given}).eos_token_ids == expected


@families
def test_outer_eos_token_goes_before_the_inner_one(model_type: str, saved: dict[str, Path]) -> None:
    from transformers import GenerationConfig

    config = json.loads((saved[model_type] / "config.json").read_text()) | {"eos_token_id": 5}
    assert GenerationConfig.from_model_config(copy.deepcopy(config)).eos_token_id == 5
    assert family_for(config).config(config).eos_token_ids == (5,)


def test_hub_helpers_really_change_the_files(save_checkpoint: Callable[..., Path]) -> None:
    """The comparisons above mean something only if the two sides differ on disk."""
    fresh, hub = save_checkpoint(), save_checkpoint()
    edit_tensors(hub, swap_experts)
    edit_json(hub / "config.json", old_rope)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    shapes = [Checkpoint.open(directory).weight(name).shape for directory in (fresh, hub)]
    assert shapes == [(8, 48, 32), (8, 32, 48)]
    assert "rope_parameters" not in (hub / "config.json").read_text()
