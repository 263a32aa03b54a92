"""quantization_config and its like: what is understood, and what is refused by the name of its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moevlm.export.checkpoint.quantized.methods import settings_of
from moevlm.export.checkpoint.quantized.patterns import matches
from moevlm.export.checkpoint.quantized.settings import Scheme
from moevlm.runtime.core.errors import CheckpointError, MoevlmError, UnsupportedModelError
from tests.support.checkpoints import refused


def group(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    given = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"targets": ["Linear"], "weights": given | weights}},
    } | more


CONFIGS: list[tuple[Any, type[MoevlmError], tuple[str, ...]]] = [
    ({"quant_method": "bitsandbytes"}, UnsupportedModelError, ('.quant_method = "bitsandbytes" (supported: fp8, ',)),
    ({"quant_method": ["fp8"]}, UnsupportedModelError, ('.quant_method = ["fp8"] (supported: fp8, ',)),
    ({"bits": 4}, UnsupportedModelError, (".quant_method = null (supported: fp8, ",)),
    ("fp8", CheckpointError, ("quantization_config = 'fp8' (allowed: an object)",)),
    (
        {"quant_method": "fp8", "fmt": "e5m2"},
        UnsupportedModelError,
        ('.fmt = "e5m2" (supported: e4m3, float8_e4m3fn)',),
    ),
    (
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        UnsupportedModelError,
        (".weight_block_size = [128, 0] (supported: null, or two numbers, as in [128, 128])",),
    ),
    ({"quant_method": "gptq", "bits": 3}, UnsupportedModelError, (".bits = 3 (supported: 4, 8)",)),
    ({"quant_method": "gptq", "bits": True}, UnsupportedModelError, (".bits = true (supported: 4, 8)",)),
    (
        {"quant_method": "gptq", "group_size": -2},
        UnsupportedModelError,
        (".group_size = -2 (supported: -1, or a number",),
    ),
    (
        {"quant_method": "gptq", "rotation": "hadamard"},
        UnsupportedModelError,
        ("quantization_config.rotation = 'hadamard'", "--ignore-config quantization_config.rotation"),
    ),
    (
        {"quant_method": "gptq", "dynamic": {"+:.*q": {"bits": 2}}},
        UnsupportedModelError,
        (".bits = 2 (supported: 4, 8, 16)",),
    ),
    (
        {"quant_method": "gptq", "dynamic": {"-:(a+)+$": {}}},
        UnsupportedModelError,
        ('dynamic: "(a+)+$" (supported: reg',),
    ),
    ({"quant_method": "awq", "version": "gemv"}, UnsupportedModelError, ('.version = "gemv" (supported: gemm, GEMM)',)),
    ({"quant_method": "auto-round", "packing_format": "auto_round"}, UnsupportedModelError, ("auto_round:auto_gptq",)),
    (
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
        UnsupportedModelError,
        ('.quant_algo = "W4A8_AWQ" (supported: NVFP4, W4A16_NVFP4, FP8, MXFP8, MIXED_PRECISION)',),
    ),
    (group({"num_bits": 3}), UnsupportedModelError, ("config_groups.g.weights.num_bits = 3 (supported: 4, 8)",)),
    (group({"dynamic": True}), UnsupportedModelError, ("config_groups.g.weights.dynamic = true (supported: false)",)),
    (group({}, format="marlin-24"), UnsupportedModelError, ('.format = "marlin-24" (supported: pack-quantized, ',)),
    (
        group({}, transform_config={"config_groups": {"R1": {}}}),
        UnsupportedModelError,
        (".transform_config = {", "none"),
    ),
    (group({}, ignore="lm_head"), UnsupportedModelError, ('.ignore = "lm_head" (supported: a list of names)',)),
    (group({}, ignore=["re:("]), UnsupportedModelError, ('.ignore: "(" (supported: regular expressions',)),
]


@pytest.mark.parametrize(("config", "kind", "words"), CONFIGS, ids=[str(i) for i in range(len(CONFIGS))])
def test_config_that_is_not_supported_is_refused_by_its_field(
    config: Any, kind: type[MoevlmError], words: tuple[str, ...], tmp_path: Path
) -> None:
    refused(kind, *words, act=lambda: settings_of(tmp_path, {"quantization_config": config}))


def test_two_configs_that_differ_are_refused(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    both = {"quantization_config": config, "text_config": {"quantization_config": dict(config)}}
    assert settings_of(tmp_path, both).block == (128, 128)
    both["text_config"]["quantization_config"] = config | {"weight_block_size": [64, 64]}
    words = "two that differ: quantization_config and text_config.quantization_config"
    refused(CheckpointError, words, act=lambda: settings_of(tmp_path, both))


def test_field_that_a_user_lets_pass_is_left_unread(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "rotation": "hadamard"}}
    assert settings_of(tmp_path, config, ["quantization_config.rotation"]).method == "gptq"


# As published checkpoints and their tools' tests have them.
PUBLISHED: list[tuple[dict[str, Any], str]] = [
    (
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "checkpoint_format": "gptq",
            "meta": {"quantizer": ["gptqmodel:5.1"], "damp_percent": 0.05, "static_groups": False},
            "dynamic": {"-:.*attn.*": {}, "-:.*shared_expert.*": {}, "+:.*experts.*": {"bits": 8, "group_size": 32}},
        },
        "gptq",
    ),
    (
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "data_type": "int",
            "iters": 0,
            "autoround_version": "0.8.0",
            "block_name_to_quantize": "model.language_model.layers",
            "extra_config": {
                r".*\.layers\.\d+\.mlp\.gate.*": {"bits": 16, "data_type": "float"},
                "model.language_model.layers.0.self_attn.q_proj": {"bits": 8},
            },
        },
        "gptq",
    ),
    (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": ["visual", "model.language_model.layers.0."],
            "ignore": [],
            "backend": "autoawq",
            "do_fuse": False,
        },
        "awq",
    ),
    (
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0",
            "modules_to_not_convert": ["lm_head", "model.visual.merger.mlp.0"],
        },
        "fp8",
    ),
    (
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "ignore": ["mtp*"],
            "producer": {"name": "modelopt", "version": "0.41"},
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "quantized_layers": {"model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}},
        },
        "modelopt",
    ),
    (
        group({"actorder": "static", "observer": "mse", "observer_kwargs": {}, "zp_dtype": None, "scale_dtype": None})
        | {"global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}, "version": "0.12.2"}
        | {"provider": "auto-round", "kv_cache_scheme": None, "quantization_status": "compressed"},
        "compressed-tensors",
    ),
]


@pytest.mark.parametrize(("config", "method"), PUBLISHED, ids=[f"{i}-{p[1]}" for i, p in enumerate(PUBLISHED)])
def test_configs_as_published_are_understood(config: dict[str, Any], method: str, tmp_path: Path) -> None:
    assert settings_of(tmp_path, {"quantization_config": config}).method == method


def test_exceptions_of_modules_are_followed(tmp_path: Path) -> None:
    (gptq, _), (auto_round, _), *_ = PUBLISHED
    settings = settings_of(tmp_path, {"quantization_config": gptq})
    assert settings.scheme("model.layers.0.self_attn.q_proj") == Scheme()
    assert settings.scheme("model.layers.0.mlp.experts.3.up_proj") == Scheme(8, 32, True)
    assert settings.scheme("model.layers.0.mlp.up_proj") == Scheme(4, 128, True)
    settings = settings_of(tmp_path, {"quantization_config": auto_round})
    assert settings.scheme("model.layers.10.mlp.gate") == Scheme()
    assert settings.scheme("model.language_model.layers.0.self_attn.q_proj") == Scheme(8, 128, True)
    assert settings.scheme("model.language_model.layers.0.self_attn.k_proj") == Scheme(4, 128, True)


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        ("lm_head", ("lm_head",), ("lm_head2", "a.lm_head.b")),
        ("model.visual", ("model.visual", "model.visual.blocks.0.attn"), ("model.visuals",)),
        ("mlp.gate", ("model.layers.3.mlp.gate",), ("model.layers.3.mlp.gate_proj",)),
        ("*shared_expert*", ("model.layers.0.mlp.shared_expert.up_proj",), ("model.layers.0.mlp.experts",)),
        ("re:.*self_attn.*", ("model.layers.1.self_attn.q_proj",), ("model.layers.1.mlp",)),
    ],
)
def test_lists_of_modules_have_names_globs_and_expressions(
    pattern: str, fitting: tuple[str, ...], others: tuple[str, ...]
) -> None:
    fits = matches("ignore", [pattern])
    assert all(map(fits, fitting))
    assert not any(map(fits, others))
