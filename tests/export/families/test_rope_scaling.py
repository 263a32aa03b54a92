"""Scaled rope against transformers: frequencies of drawn parameters, tables of whole modules, spellings, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, Glm4MoeConfig, Glm4vMoeConfig, GptOssConfig, Qwen3MoeConfig, Qwen3VLMoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeTextRotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRotaryEmbedding

from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import mrope, one_axis
from moevlm.runtime.core.errors import CheckpointError, MoevlmError
from moevlm.runtime.core.manifest import RopeMetadata
from moevlm.runtime.core.rotary import inverse_frequencies
from moevlm.runtime.request.positions import rope_tables

Values = dict[str, Any]


def maybe(rng: np.random.Generator, **fields: Any) -> Values:
    """Each of these fields, or not."""
    return {key: value for key, value in fields.items() if rng.random() < 0.5}


def yarn(rng: np.random.Generator, _: int) -> Values:
    return {"factor": rng.uniform(1, 64)} | maybe(
        rng,
        beta_fast=rng.uniform(8, 64),
        beta_slow=rng.uniform(0.5, 4),
        attention_factor=rng.uniform(0.5, 2),
        mscale=rng.choice([0.0, 0.7, 1.0]).item(),
        mscale_all_dim=rng.uniform(0.5, 1.5),
        truncate=bool(rng.integers(2)),
        original_max_position_embeddings=int(rng.integers(1 << 10, 1 << 17)),
    )


def llama3(rng: np.random.Generator, _: int) -> Values:
    low = rng.uniform(0.5, 2)
    context = int(rng.integers(1 << 10, 1 << 15))
    return {
        "factor": rng.uniform(1, 64),
        "low_freq_factor": low,
        "high_freq_factor": low + rng.choice([0, rng.uniform(1, 4)]).item(),
        "original_max_position_embeddings": context,
    }


def longrope(rng: np.random.Generator, pairs: int) -> Values:
    factors = {name: rng.uniform(1, 40, pairs).tolist() for name in ("short_factor", "long_factor")}
    return factors | {"original_max_position_embeddings": 1 << 18} | maybe(
        rng, factor=rng.uniform(1, 64), attention_factor=rng.uniform(0.5, 2)
    )  # fmt: skip


DRAWN: dict[str, Callable[[np.random.Generator, int], Values]] = {
    "linear": lambda rng, _: {"factor": rng.uniform(1, 64)},
    "dynamic": lambda rng, _: {"factor": rng.uniform(1, 64)},
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
    "proportional": lambda rng, _: {"factor": rng.uniform(1, 8)},
}


def frequencies(rope: RopeMetadata) -> np.ndarray:
    return np.array(rope.frequencies, np.float32) if rope.frequencies else inverse_frequencies(rope.dim, rope.theta)


def rounded_power(exponent: torch.Tensor, base: float) -> torch.Tensor:
    return torch.from_numpy(np.power(np.float64(base), exponent.numpy().astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", DRAWN)
def test_frequencies_and_factor_are_those_of_transformers(
    kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch's powers are a unit in the last place off for a few exponents; both sides get the rounded ones.
    monkeypatch.setattr(torch.Tensor, "__rpow__", rounded_power)
    rng = np.random.default_rng(seed)
    head_dim, partial = int(rng.choice([64, 96, 128])), rng.choice([0.25, 0.5, 1.0]).item()
    pairs = int(head_dim * partial) // 2
    values: Values = {
        "head_dim": head_dim,
        "max_position_embeddings": 1 << 18,
        "rope_parameters": {
            "rope_type": kind,
            "rope_theta": float(10 ** rng.uniform(4, 7)),
            "partial_rotary_factor": partial,
            **DRAWN[kind](rng, pairs),
        },
    }
    ours = one_axis(Fields(values), head_dim, default_partial=0.5)
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](Glm4MoeConfig(**values))
    np.testing.assert_array_max_ulp(frequencies(ours), theirs.numpy(), maxulp=1)
    assert ours.factor == pytest.approx(factor, rel=1e-15)
    assert ours.dim == 2 * len(theirs)


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(32)], "long_factor": [9.0] * 32}


def of_three_axes(text: Values, head_dim: int, interleaved: bool, partial: float | None) -> RopeMetadata:
    sections = (24, 20, 20) if interleaved else (8, 12, 12)
    return mrope(
        Fields(text), head_dim, interleaved=interleaved, default_sections=sections, default_partial=partial
    )  # fmt: skip


def qwen3_vl_moe(text: Values) -> tuple[RopeMetadata, torch.nn.Module]:
    module = Qwen3VLMoeTextRotaryEmbedding(Qwen3VLMoeConfig(text_config=text).text_config)
    return of_three_axes(text, 128, True, None), module


def glm4v_moe(text: Values) -> tuple[RopeMetadata, torch.nn.Module]:
    module = Glm4vMoeTextRotaryEmbedding(Glm4vMoeConfig(text_config=text).text_config)
    return of_three_axes(text, 128, False, 0.5), module


def deepseek_v3(text: Values) -> tuple[RopeMetadata, torch.nn.Module]:
    return one_axis(Fields(text), 64), DeepseekV3RotaryEmbedding(DeepseekV3Config(**text))


def gpt_oss(text: Values) -> tuple[RopeMetadata, torch.nn.Module]:
    return one_axis(Fields(text), 64), GptOssRotaryEmbedding(GptOssConfig(**text))


def qwen3_moe(text: Values) -> tuple[RopeMetadata, torch.nn.Module]:
    return one_axis(Fields(text), 64), Qwen3MoeRotaryEmbedding(Qwen3MoeConfig(**text))


MODULES: dict[str, tuple[Callable[[Values], tuple[RopeMetadata, torch.nn.Module]], int, Values]] = {
    "Qwen3-VL, yarn on three axes": (qwen3_vl_moe, 128, YARN | {"mrope_section": [24, 20, 20], "rope_theta": 5e6}),
    "GLM-4.5V, yarn on half of a head": (glm4v_moe, 128, YARN | {"mrope_section": [8, 12, 12], "rope_theta": 1e4}),
    "GLM-4.5V, linear": (glm4v_moe, 128, {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}),
    "DeepSeek-V3, two scales": (
        deepseek_v3,
        64,
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1, "rope_theta": 1e4},
    ),
    "gpt-oss, a ramp between whole frequencies": (
        gpt_oss,
        64,
        YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "rope_theta": 15e4},
    ),
    "Qwen3, llama3": (qwen3_moe, 64, LLAMA3 | {"original_max_position_embeddings": 512, "rope_theta": 1e5}),
    "Qwen3, dynamic up to its context": (qwen3_moe, 64, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
    "Qwen3, longrope": (qwen3_moe, 64, LONG | {"original_max_position_embeddings": 4096, "rope_theta": 1e4}),
}


@pytest.mark.parametrize("name", MODULES)
def test_tables_equal_those_of_whole_modules(name: str) -> None:
    build, head_dim, rope = MODULES[name]
    text = {"head_dim": head_dim, "max_position_embeddings": 4096, "rope_parameters": dict(rope)}
    ours, module = build(text)
    positions = np.random.default_rng(3).integers(0, 4096, (3, 300))
    positions[:, :2] = 0, 4095
    if not ours.sections:
        positions[1:] = positions[0]
    theirs = module(torch.zeros(1), torch.from_numpy(positions if ours.sections else positions[0])[..., None, :])
    # One unit in the last place of a frequency, at the longest angle.
    tolerance = 1.2e-7 * (1 + 4 * 4096 * frequencies(ours)) * ours.factor
    for mine, other in zip(rope_tables(positions, ours), theirs, strict=True):
        assert (np.abs(mine - other[..., : mine.shape[1]].numpy().reshape(mine.shape)) <= tolerance).all()
    if name != "Qwen3, dynamic up to its context":
        assert ours.frequencies


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_older_spelling_is_the_same_rope(kind: str) -> None:
    scaling = {key: value for key, value in YARN.items() if key != "rope_type"}
    shared = {"max_position_embeddings": 4096}
    new = shared | {"rope_parameters": YARN | {"rope_theta": 1e6}}
    old = shared | {"rope_scaling": scaling | {kind: "yarn"}, "rope_theta": 1e6}
    assert one_axis(Fields(old), 128) == one_axis(Fields(new), 128)


def test_two_spellings_at_once_are_refused() -> None:
    """As in a config.json that transformers saved and to which somebody added what a model card says."""
    both = {"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    one_axis(Fields(both | {"rope_scaling": None}), 128)
    told = re.escape("(allowed: none beside rope_parameters, where its fields belong)")
    with pytest.raises(CheckpointError, match=rf"rope_scaling = \{{.* {told}$"):
        one_axis(Fields(both | {"rope_scaling": YARN}), 128)


@pytest.mark.parametrize("rope", [{"factor": None, "original_max_position_embeddings": 77}, {"factor": 8.0}])
def test_lengths_of_contexts_stand_in_for_each_other(rope: Values) -> None:
    """A factor that is null is their ratio; Phi 3's place of the original one goes before the rope's own."""
    text = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **rope},
    }
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](Glm4MoeConfig(head_dim=64, **text, partial_rotary_factor=1.0))
    ours = one_axis(Fields(text), 64)
    np.testing.assert_allclose(frequencies(ours), theirs.numpy(), rtol=3e-7)
    assert ours.factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("rope", "told"),
    [
        ({"rope_type": "yarn", "factor": "8"}, "rope_parameters.factor = '8' (allowed: a number"),
        ({"rope_type": "linear"}, "config.json lacks rope_parameters.factor"),
        (LLAMA3 | {"high_freq_factor": 0.5}, "high_freq_factor = 0.5 (allowed: low_freq_factor = 1.0 or more)"),
        (
            LONG | {"original_max_position_embeddings": 2048},
            "max_position_embeddings = 4096 (allowed: up to original_max_position_embeddings = 2048: longrope has",
        ),
        (
            LLAMA3 | {"factor": 1e-30},
            "rope_type = 'llama3' (allowed: frequencies up to 1048576, with these numbers one is 2.0e+27)",
        ),
        (
            {"rope_type": "linear", "factor": 1e-30},
            "rope_type = 'linear' (allowed: frequencies up to 1048576, with these numbers one is 1.0e+30)",
        ),
        (LONG | {"short_factor": [1.0] * 7}, "short_factor = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0] (allowed: 32 numbers"),
    ],
    ids=[
        "no number",
        "no factor",
        "bands the wrong way round",
        "both tables",
        "beyond float32",
        "too fast",
        "too short a table",
    ],
)
def test_what_has_no_meaning_is_refused_by_name(rope: Values, told: str) -> None:
    text = {"max_position_embeddings": 4096, "rope_parameters": {"rope_theta": 1e4, **rope}}
    with pytest.raises(CheckpointError, match=re.escape(told)):
        one_axis(Fields(text), 64)


def test_a_field_of_another_variant_is_not_passed_over() -> None:
    text = Fields({"max_position_embeddings": 4096, "rope_parameters": LLAMA3 | {"rope_theta": 1e4, "mscale": 1.0}})
    one_axis(text, 64)
    with pytest.raises(MoevlmError, match=r"unsupported field in config.json: rope_parameters.mscale = 1.0"):
        text.refuse_unread()
