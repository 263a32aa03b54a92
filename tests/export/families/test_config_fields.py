"""config.json to the canonical config: every spelling, one line for a field that is not understood or impossible."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moevlm.export.config import ModelConfig, MoEConfig
from moevlm.export.families import family_for
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from tests.support.checkpoints import FAMILIES, canonical, families, refused
from tests.support.families import TINY
from tests.support.tiny import edit_json


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


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "llama"}, '"llama"'),
        ({"model_type": "qwen3_vl_moe_text"}, '"qwen3_vl_moe_text"'),
        ({}, "null"),
        ({"model_type": []}, "[]"),
        ({"model_type": {}}, "{}"),
        ({"model_type": "x" * 10**6}, "xxx..."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_unsupported_model_type_lists_the_supported(config: dict[str, Any], told: str) -> None:
    refused(
        UnsupportedModelError,
        "model_type = ",
        told,
        "supported: " + ", ".join(sorted(TINY)),
        act=lambda: family_for(config),
    )


ROPES = "default, linear, dynamic, yarn, longrope, llama3, proportional"
CHOICES = [
    ("qwen3_vl_moe", "text_config.hidden_act", "gelu", "silu"),
    ("qwen3_vl_moe", "text_config.norm_topk_prob", False, "true"),
    ("qwen3_vl_moe", "text_config.use_sliding_window", True, "false"),
    ("qwen3_vl_moe", "text_config.rope_parameters.rope_type", "su", ROPES),
    ("qwen3_vl_moe", "text_config.rope_parameters.rope_type", "mrope", ROPES),
    ("qwen3_vl_moe", "text_config.rope_parameters.partial_rotary_factor", 0.5, "1.0"),
    ("qwen3_vl_moe", "text_config.partial_rotary_factor", 0.5, "1.0"),
    ("qwen3_vl_moe", "text_config.rope_theta", 5000000, "10000.0"),
    ("qwen3_vl_moe", "text_config.rope_parameters.mrope_interleaved", False, "true"),
    ("qwen3_vl_moe", "vision_config.hidden_act", "relu2", "gelu_pytorch_tanh, gelu, silu"),
    ("qwen3_vl_moe", "vision_config.rope_parameters.rope_type", "linear", "axial, default"),
    ("glm4v_moe", "text_config.hidden_act", ["silu"], "silu"),
    ("glm4v_moe", "text_config.use_qk_norm", True, "false"),
    ("glm4v_moe", "text_config.rope_parameters.rope_type", "ntk", ROPES),
    ("glm4v_moe", "text_config.rope_parameters.mrope_interleaved", True, "false"),
    ("glm4v_moe", "vision_config.hidden_act", "gelu", "silu"),
    ("glm4v_moe", "vision_config.rope_parameters.rope_type", "yarn", "axial, default"),
    ("qwen3_5_moe", "text_config.hidden_act", "gelu", "silu"),
    ("qwen3_5_moe", "text_config.norm_topk_prob", False, "true"),
    ("qwen3_5_moe", "text_config.attn_output_gate", False, "true"),
    ("qwen3_5_moe", "text_config.output_gate_type", "sigmoid", "swish, silu"),
    ("qwen3_5_moe", "text_config.rope_parameters.rope_type", "su", ROPES),
    ("qwen3_5_moe", "text_config.rope_parameters.mrope_interleaved", False, "true"),
    ("gemma4", "text_config.hidden_size_per_layer_input", 256, "0"),
    ("gemma4", "text_config.num_kv_shared_layers", 1, "0"),
    ("gemma4", "text_config.use_bidirectional_attention", "all", "vision"),
    ("gemma4", "text_config.hidden_activation", "silu", "gelu_pytorch_tanh"),
    ("gemma4", "text_config.rope_parameters.full_attention.rope_type", "su", ROPES),
    ("gemma4", "text_config.rope_parameters.sliding_attention.partial_rotary_factor", 0.5, "1.0"),
    ("gemma4", "vision_config.use_clipped_linears", True, "false"),
    ("gemma4", "vision_config.hidden_activation", "silu", "gelu_pytorch_tanh"),
    ("gemma4", "vision_config.rope_parameters.rope_type", "linear", "axial, default"),
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


def test_every_choice_is_refused_somewhere() -> None:
    """A new `choice` without a line above, or in a file beside this one, fails this test."""
    here, there = Path(__file__).parent, Path(__file__).parents[3] / "export" / "families"
    tests = "\n".join(path.read_text() for path in here.glob("test_*.py"))
    made = [name for path in there.rglob("*.py") for name in re.findall(r'\.choice\(\s*"(\w+)"', path.read_text())]
    assert len(made) > 20
    assert [name for name in made if not re.search(rf'[."]{name}"', tests)] == []


KINDS = {"qwen3_5_moe": "linear_attention or full_attention"}  # of layers, where there are others than attention to all


@families
@pytest.mark.parametrize("types", [["sliding_attention", "full_attention"], ["full_attention"], "full_attention"])
def test_layers_of_another_kind_are_refused(types: Any, model_type: str, saved: dict[str, Path]) -> None:
    told = json.dumps(types) if isinstance(types, list) else repr(types)
    refused(
        UnsupportedModelError,
        f"text_config.layer_types = {told} (supported: 2 times {KINDS.get(model_type, 'full_attention')})",
        act=lambda: parse(saved[model_type], text_config={"layer_types": types}),
    )


UNKNOWN = [
    ("text_config.attn_logit_softcapping", 30.0),
    ("text_config.rope_parameters.factor", 4.0),
    ("vision_config.window_size", 112),
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


COPIES = {"vocab_size": 263, "hidden_size": 32, "max_position_embeddings": 512, "patch_size": 4, "head_dim": 16}


@families
def test_copies_at_the_top_that_agree_with_the_nested_field_pass(model_type: str, saved: dict[str, Path]) -> None:
    assert parse(saved[model_type], **COPIES) == parse(saved[model_type])
    for name, value in COPIES.items():
        nested_name = f"{'vision' if name == 'patch_size' else 'text'}_config.{name}"
        refused(
            UnsupportedModelError,
            f"unsupported field in config.json: {name} = {value + 1} (allowed: {nested_name} = {value})",
            act=lambda name=name, value=value: parse(saved[model_type], **{name: value + 1}),
        )


@families
def test_fields_of_the_base_class_and_of_generation_are_harmless(model_type: str, saved: dict[str, Path]) -> None:
    """transformers' own lists, so that a release that adds to them is noticed."""
    from transformers import GenerationConfig, PreTrainedConfig

    generation = {name: value or 7 for name, value in GenerationConfig._get_default_generation_params().items()}
    base = {name: value or "x" for name, value in PreTrainedConfig().to_dict().items() if name != "model_type"}
    marks = {
        "_attn_implementation": "sdpa",
        "_attn_implementation_autoset": True,
        "cache_implementation": "hybrid",  # as transformers 4.51 wrote it for Llama 4
        "num_mtp_layers": 1,
        "unsloth_fixed": True,
        "unsloth_version": "2025.11.1",
        "tokenizer_class": "Qwen2Tokenizer",
        "_name_or_path": "somewhere",
    }
    fields = generation | base | marks
    assert len(fields) > 40
    changed = parse(saved[model_type], **fields, text_config=fields, vision_config=fields)
    assert changed == parse(saved[model_type])


# What transformers 4 wrote into every nested object, beside what the test above has.
WRITTEN_BY_4 = {
    "tie_word_embeddings": True,
    "torchscript": False,
    "pruned_heads": {},
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "task_specific_params": None,
    "tokenizer_class": None,
    "prefix": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "temperature": 1.0,
    "top_k": 50,
    "max_length": 20,
}


@families
def test_nested_objects_as_transformers_4_wrote_them_are_read(model_type: str, saved: dict[str, Path]) -> None:
    text = WRITTEN_BY_4 | {"tie_word_embeddings": False}
    changed = parse(saved[model_type], text_config=text, vision_config=WRITTEN_BY_4)
    assert changed == parse(saved[model_type])


@pytest.mark.parametrize("model_type", ["aria", "internvl", "kimi_k25", "mistral3"])
def test_nested_objects_of_wrappers_as_transformers_4_wrote_them_are_read(
    model_type: str, saved: dict[str, Path]
) -> None:
    test_nested_objects_as_transformers_4_wrote_them_are_read(model_type, saved)


def test_number_of_layers_with_a_window_is_harmless_where_none_has_one(saved: dict[str, Path]) -> None:
    text = {"max_window_layers": 28, "use_sliding_window": False}
    assert parse(saved["qwen3_vl_moe"], text_config=text) == parse(saved["qwen3_vl_moe"])


def ignoring(saved: Path, ignored: list[str], **changes: Any) -> ModelConfig:
    config = merge(json.loads((saved / "config.json").read_text()), changes)
    return family_for(config).config(config, ignored)


@families
def test_unknown_fields_can_be_ignored_by_name_and_others_cannot(model_type: str, saved: dict[str, Path]) -> None:
    directory, unknown = saved[model_type], {"moe_layer_freq": [0, 1], "text_config": {"attn_logit_softcapping": 30.0}}
    names = ["moe_layer_freq", "text_config.attn_logit_softcapping"]
    assert ignoring(directory, names, **unknown) == parse(directory)
    refused(
        UnsupportedModelError,
        "text_config.attn_logit_softcapping = 30.0 (if it leaves",
        "--ignore-config text_config.attn_logit_softcapping)",
        act=lambda: ignoring(directory, names[:1], **unknown),
    )
    for name in ("text_config.absent", "absent", "text_config.hidden_size.x", "attn_logit_softcapping"):
        refused(
            UnsupportedModelError,
            f"cannot ignore {name}: config.json has no such field",
            act=lambda name=name: ignoring(directory, [name], **unknown),
        )
    for name in ("text_config.hidden_size", "text_config", "text_config.use_sliding_window"):
        if model_type == "qwen3_vl_moe" or "window" not in name:
            refused(
                UnsupportedModelError,
                f"cannot ignore {name} of config.json: it is supported and used",
                act=lambda name=name: ignoring(directory, [name], text_config={"use_sliding_window": True}),
            )


COUNTS_OF_ALL = [
    *("text_config.num_hidden_layers", "text_config.hidden_size", "text_config.vocab_size", "text_config.head_dim"),
    *("text_config.num_experts_per_tok", "text_config.moe_intermediate_size"),
    *("text_config.num_attention_heads", "text_config.num_key_value_heads", "text_config.max_position_embeddings"),
    *("vision_config.depth", "vision_config.hidden_size", "vision_config.intermediate_size", "vision_config.num_heads"),
    *("vision_config.patch_size", "vision_config.temporal_patch_size", "vision_config.spatial_merge_size"),
    *("vision_config.in_channels", "vision_config.out_hidden_size", "image_token_id", "text_config.eos_token_id"),
]

COUNTS = [
    *((model_type, path) for model_type in FAMILIES for path in COUNTS_OF_ALL),
    *((model_type, "text_config.intermediate_size") for model_type in ("qwen3_vl_moe", "glm4v_moe")),
    *(
        ("qwen3_5_moe", f"text_config.linear_{name}")
        for name in ("num_key_heads", "num_value_heads", "conv_kernel_dim")
    ),
    *(("qwen3_5_moe", f"text_config.linear_{name}_head_dim") for name in ("key", "value")),
    *(
        ("qwen3_5_moe", f"text_config.{name}")
        for name in ("shared_expert_intermediate_size", "full_attention_interval")
    ),
]


@pytest.mark.parametrize(("model_type", "path"), COUNTS)
def test_count_out_of_range_is_refused_by_name_before_any_work(
    path: str, model_type: str, saved: dict[str, Path]
) -> None:
    values = [10**10, 10**30, 10**400, True, 1.5, float("nan")]
    for value in [*values, 10**6] if path.endswith(("layers", "depth", "heads")) else values:
        with pytest.raises((CheckpointError, UnsupportedModelError)) as raised:
            parse(saved[model_type], **nested(path, value))
        message = str(raised.value)
        assert f"{path} = " in message
        assert "(allowed: an integer from " in message
        assert len(message) < 300


@families
@pytest.mark.parametrize(
    "value", [10**400, 1e300, 1e-300, float("nan"), float("inf"), True, "1"], ids=lambda v: str(v)[:8]
)
@pytest.mark.parametrize("path", ["text_config.rope_parameters.rope_theta", "text_config.rms_norm_eps"])
def test_number_that_float32_does_not_hold_is_refused_by_name(
    path: str, value: Any, model_type: str, saved: dict[str, Path]
) -> None:
    refused(
        CheckpointError,
        f"{path} = ",
        "(allowed: a number from 1e-30 to 1e+30)",
        act=lambda: parse(saved[model_type], **nested(path, value)),
    )


@families
def test_long_values_are_cut_in_messages(model_type: str, saved: dict[str, Path]) -> None:
    for path in ("text_config.hidden_act", "text_config.hidden_size", "evil", "text_config.layer_types"):
        with pytest.raises((CheckpointError, UnsupportedModelError)) as raised:
            parse(saved[model_type], **nested(path, "x" * 10**6))
        assert len(str(raised.value)) < 300
    if model_type == "qwen3_vl_moe":
        with pytest.raises(UnsupportedModelError) as raised:
            parse(saved[model_type], vision_config={"deepstack_visual_indexes": [0] * 4000})
        assert len(str(raised.value)) < 300


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
    ("qwen3_5_moe", {"text_config": {"layer_types": None, "full_attention_interval": 2}}),
    ("qwen3_5_moe", {"text_config": {"full_attention_interval": 3}}),  # layer_types goes before
    ("qwen3_5_moe", {"text_config": {"output_gate_type": "swish", "attn_output_gate": True}}),
    ("qwen3_5_moe", {"text_config": {"mtp_num_hidden_layers": 1, "mamba_ssm_dtype": "float32"}}),
    (
        "qwen3_5_moe",
        {"text_config": {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": REMOVED}}},
    ),
    ("qwen3_5_moe", {"text_config": {"num_local_experts": 8, "num_experts": 8}}),
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
        f'text_config.{place}.{name} = "mrope" (supported: {ROPES})',
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
    (rope,) = new.decoder.ropes
    assert (rope.theta, rope.sections, rope.interleaved) == (5e6, (24, 20, 20), True)


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
    assert old.decoder.ropes[0].dim == 8
    assert {layer.mixer.rotary_dim for layer in old.decoder.layers} == {8}


def test_decoder_rotates_as_many_dimensions_as_its_rope_has(saved: dict[str, Path]) -> None:
    decoder = parse(saved["glm4v_moe"]).decoder
    with pytest.raises(ValueError, match=r"rotary_dim = 8 \(allowed: rope.dim = 16\)"):
        dataclasses.replace(decoder, ropes=parse(saved["qwen3_vl_moe"]).decoder.ropes)
    with pytest.raises(ValueError, match=r"rope = 0 \(allowed: one of the 0 rope groups\)"):
        dataclasses.replace(decoder, ropes=())


WRONG = [
    (
        "qwen3_vl_moe",
        "text_config.rope_parameters.mrope_section",
        [4, 4, 4],
        "rope_parameters.mrope_section = [4, 4, 4]",
    ),
    ("qwen3_vl_moe", "text_config.rope_parameters.mrope_section", [8], "add up to 8"),
    (
        "qwen3_vl_moe",
        "text_config.rope_parameters.mrope_section",
        8,
        "mrope_section = 8 (allowed: a list of integers from 0",
    ),
    (
        "qwen3_vl_moe",
        "text_config.rope_parameters.rope_theta",
        "big",
        "rope_theta = 'big' (allowed: a number from 1e-30 to 1e+30)",
    ),
    ("qwen3_vl_moe", "text_config.num_experts_per_tok", 9, "text_config.num_experts_per_tok = 9"),
    (
        "qwen3_vl_moe",
        "text_config.num_experts_per_tok",
        0,
        "num_experts_per_tok = 0 (allowed: an integer from 1 to 65536)",
    ),
    ("qwen3_vl_moe", "text_config.hidden_size", "32", "hidden_size = '32' (allowed: an integer from 1 to 1048576)"),
    ("qwen3_vl_moe", "text_config.vocab_size", None, "lacks text_config.vocab_size"),
    (
        "qwen3_vl_moe",
        "text_config.num_key_value_heads",
        3,
        "num_key_value_heads = 3 (allowed: a divisor of the 4 heads)",
    ),
    (
        "qwen3_vl_moe",
        "text_config",
        {"hidden_size": 3, "head_dim": None},
        "text_config.head_dim = 0 (allowed: an integer from 1 to 16384)",
    ),
    (
        "qwen3_vl_moe",
        "text_config.head_dim",
        7,
        "text_config.head_dim = 7 (allowed: an even number of rotating dimensions from 2 to 7, here 7",
    ),
    (
        "qwen3_vl_moe",
        "text_config.num_experts",
        4,
        "text_config.num_local_experts = 8 (allowed: text_config.num_experts = 4)",
    ),
    ("qwen3_vl_moe", "text_config.mlp_only_layers", 1, "mlp_only_layers = 1 (allowed: a list of integers from 0"),
    ("qwen3_vl_moe", "text_config.rms_norm_eps", "tiny", "rms_norm_eps = 'tiny'"),
    ("qwen3_vl_moe", "text_config.attention_bias", "yes", "attention_bias = 'yes' (allowed: true or false)"),
    ("qwen3_vl_moe", "text_config.eos_token_id", ["a"], 'eos_token_id = ["a"]'),
    ("qwen3_vl_moe", "text_config", None, "lacks text_config"),
    ("qwen3_vl_moe", "image_token_id", None, "lacks image_token_id"),
    ("qwen3_vl_moe", "image_token_id", "5", "image_token_id = '5'"),
    ("qwen3_vl_moe", "image_token_id", 263, "image_token_id = 263 (allowed: up to 262)"),
    ("qwen3_vl_moe", "video_token_id", 263, "video_token_id = 263 (allowed: up to 262)"),
    ("qwen3_vl_moe", "vision_start_token_id", 263, "vision_start_token_id = 263 (allowed: up to 262)"),
    ("glm4v_moe", "image_end_token_id", 263, "image_end_token_id = 263 (allowed: up to 262)"),
    ("gemma4", "boi_token_id", 263, "boi_token_id = 263 (allowed: up to 262)"),
    ("qwen3_vl_moe", "vision_config", 7, "vision_config = 7 (allowed: an object)"),
    ("qwen3_vl_moe", "vision_config.num_position_embeddings", 26, "= 26 (allowed: a square number)"),
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
    (
        "glm4v_moe",
        "text_config",
        {"n_routed_experts": 1, "n_group": 1},
        "text_config.n_routed_experts = 1 (allowed: 2 or more)",
    ),
    ("glm4v_moe", "text_config.n_group", 3, "text_config.n_group = 3 (allowed: a divisor of the 8 experts up to 4)"),
    ("glm4v_moe", "text_config.n_group", 8, "text_config.n_group = 8 (allowed: a divisor of the 8 experts up to 4)"),
    (
        "glm4v_moe",
        "text_config.num_local_experts",
        4,
        "num_local_experts = 4 (allowed: text_config.n_routed_experts = 8)",
    ),
    ("glm4v_moe", "text_config.topk_group", 3, "text_config.topk_group = 3 (allowed: 1 to n_group = 2)"),
    ("glm4v_moe", "text_config.num_experts_per_tok", 5, "text_config.num_experts_per_tok = 5"),
    (
        "glm4v_moe",
        "text_config.routed_scaling_factor",
        -1.0,
        "routed_scaling_factor = -1.0 (allowed: a number from 1e-30 to 1e+30)",
    ),
    ("glm4v_moe", "text_config.first_k_dense_replace", "one", "first_k_dense_replace = 'one'"),
    ("glm4v_moe", "text_config.rope_parameters.partial_rotary_factor", 0.25, "add up to 2"),
    (
        "glm4v_moe",
        "text_config.rope_parameters.partial_rotary_factor",
        1.5,
        "head_dim = 16 (allowed: an even number of rotating dimensions from 2 to 16, here 24",
    ),
    ("glm4v_moe", "vision_config.num_heads", 5, "vision_config.num_heads = 5"),
    (
        "qwen3_5_moe",
        "text_config.linear_num_value_heads",
        3,
        "text_config.linear_num_key_heads = 2 (allowed: a divisor",
    ),
    ("qwen3_5_moe", "text_config.linear_conv_kernel_dim", 1, "text_config.linear_conv_kernel_dim = 1 (allowed: 2 or"),
    ("qwen3_5_moe", "text_config.rope_parameters.mrope_section", [1, 1, 1], "add up to 4"),
    (
        "qwen3_5_moe",
        "vision_config.deepstack_visual_indexes",
        [0],
        "unsupported field in config.json: vision_config.de",
    ),
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
        layers = parse(saved[model_type], text_config={"num_hidden_layers": 6} | text).decoder.layers
        return [i for i, layer in enumerate(layers) if isinstance(layer.feed_forward, MoEConfig)]

    assert sparse("qwen3_vl_moe") == [0, 1, 2, 3, 4, 5]
    assert sparse("qwen3_vl_moe", decoder_sparse_step=3) == [2, 5]
    assert sparse("qwen3_vl_moe", decoder_sparse_step=2, mlp_only_layers=[3]) == [1, 5]
    assert sparse("glm4v_moe", first_k_dense_replace=4) == [4, 5]


def test_eos_token_may_be_one_several_or_none(saved: dict[str, Path]) -> None:
    for given, expected in ((7, (7,)), ([7, 8], (7, 8)), (None, ())):
        for model_type, directory in saved.items():
            config = json.loads((directory / "config.json").read_text())
            part, text = family_for(config).part, {"eos_token_id": given}
            inner = {"text_config": text} if "text_config" in (config[part] if part else config) else text
            assert parse(directory, **({part: inner} if part else inner)).eos_token_ids == expected, model_type


@families
def test_outer_eos_token_goes_before_the_inner_one(model_type: str, saved: dict[str, Path]) -> None:
    from transformers import GenerationConfig

    config = json.loads((saved[model_type] / "config.json").read_text()) | {"eos_token_id": 5}
    assert GenerationConfig.from_model_config(copy.deepcopy(config)).eos_token_id == 5
    assert family_for(config).config(config).eos_token_ids == (5,)


def test_config_of_qwen3_6_as_published_is_understood() -> None:
    """Every field of Qwen/Qwen3.6-35B-A3B."""
    layers, turned = ["linear_attention"] * 3 + ["full_attention"], {"mrope_section": [11, 11, 10]}
    text = {
        **{"model_type": "qwen3_5_moe_text", "dtype": "bfloat16", "initializer_range": 0.02, "use_cache": True},
        **{"attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "output_gate_type": "swish"},
        **{"bos_token_id": 248044, "eos_token_id": 248044, "pad_token_id": None, "vocab_size": 248320},
        **{"full_attention_interval": 4, "layer_types": layers * 10, "num_hidden_layers": 40, "hidden_size": 2048},
        **{"head_dim": 256, "num_attention_heads": 16, "num_key_value_heads": 2, "hidden_act": "silu"},
        **{"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "mamba_ssm_dtype": "float32"},
        **{"max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "partial_rotary_factor": 0.25},
        **{"mlp_only_layers": [], "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
        **{"num_experts": 256, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.001, "output_router_logits": False},
        **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "tie_word_embeddings": False},
        "rope_parameters": {
            **{"mrope_interleaved": True, "rope_type": "default", "rope_theta": 10000000},
            **{"partial_rotary_factor": 0.25, **turned},
        },
    }
    vision = {
        **{"model_type": "qwen3_5_moe", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16},
        **{"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2},
        **{"temporal_patch_size": 2, "num_position_embeddings": 2304, "out_hidden_size": 2048},
        **{"deepstack_visual_indexes": [], "initializer_range": 0.02},
    }
    top = {
        **{"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"},
        **{"image_token_id": 248056, "video_token_id": 248057, "language_model_only": False},
        **{"vision_start_token_id": 248053, "vision_end_token_id": 248054, "tie_word_embeddings": False},
    }
    config = family_for(top).config({**top, "text_config": text, "vision_config": vision})
    delta, attention = config.decoder.layers[0].mixer, config.decoder.layers[3].mixer
    assert [layer.mixer for layer in config.decoder.layers] == [delta, delta, delta, attention] * 10
    assert [state.shape for state in delta.states(0)] == [(3, 8192), (32, 128, 128)]
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.rotary_dim) == (16, 2, 256, 64)
    assert {(moe.experts, moe.router.top_k, moe.shared_width) for moe in config.moe.values()} == {(256, 8, 512)}
