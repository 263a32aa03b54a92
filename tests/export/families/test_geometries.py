"""Models of any sizes: what a target cannot run is refused before it is traced, everything else builds and runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.backends.registry import targets
from moevlm.export.build import build, require_sizes
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.config import GatedDeltaConfig
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.export.parity.cases import Case, pack, random_cases
from moevlm.export.parity.torch_engine import TorchEngine
from moevlm.plugins.cpu import limits as cpu_limits
from moevlm.runtime.backends.base import EngineOptions
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.loading import load_engine
from tests.support.tiny import TinyCheckpoint

EXACT, ROUNDED = ("reference", "ort-cpu"), ("ort-cpu:int8", "ort-cpu:int4", "cpu:int8", "cpu:int4")


class Draw:
    """Sizes of a model, drawn without regard to what any kernel likes."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def one_of(self, *values: Any) -> Any:
        return values[int(self._rng.integers(len(values)))]

    def upto(self, most: int) -> int:
        return int(self._rng.integers(1, most + 1))

    def width(self) -> int:
        return self.one_of(self.upto(100), 4 * self.upto(20), 16 * self.upto(8), 32)

    def sections(self, total: int) -> list[int]:
        first = self.upto(total)
        second = self.upto(total - first + 1) - 1
        return [first, second, total - first - second]

    def gemma4(self) -> TinyCheckpoint:
        kv_heads, experts, wide = self.one_of(1, 2, 3), self.one_of(1, 2, 7, 70), 2 * (3 + self.upto(140))
        turned = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": self.one_of(0.25, 0.5, 1.0)}
        text = {
            "hidden_size": self.width(),
            "num_attention_heads": kv_heads * self.one_of(1, 2, 7),
            "num_key_value_heads": kv_heads,
            "num_global_key_value_heads": self.one_of(1, kv_heads),
            "head_dim": 2 * self.upto(140),
            "global_head_dim": wide,
            "attention_k_eq_v": self.one_of(True, False),
            "sliding_window": self.upto(12),
            "intermediate_size": self.width(),
            "moe_intermediate_size": self.width(),
            "num_experts": experts,
            "top_k_experts": self.one_of(experts, self.upto(experts)),
            "vocab_size": 7 + self.upto(300),
            "eos_token_id": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": turned,
            },
        }
        heads = self.one_of(1, 2, 3)
        vision = {
            "hidden_size": self.width(),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": 4 * self.upto(20),
            "intermediate_size": self.width(),
        }
        return TinyCheckpoint("gemma4", text=text, vision=vision)

    def checkpoint(self, model_type: str) -> TinyCheckpoint:
        if model_type == "gemma4":
            return self.gemma4()
        hidden, kv_heads, partial = self.width(), self.one_of(1, 2, 3, 5), model_type == "glm4v_moe"
        head_dim = self.one_of(4, 12, 20, 24, 64, 72, 100, 144, 192, 256) if partial else 2 * self.upto(140)
        rope = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": self.sections(head_dim // (4 if partial else 2)),
        }
        experts = self.one_of(2 if partial else 1, 2, 3, 7, 16, 70)
        text = {
            "hidden_size": hidden,
            "num_attention_heads": kv_heads * self.one_of(1, 2, 7, 17),
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": self.width(),
            "moe_intermediate_size": self.width(),
            "num_experts_per_tok": self.one_of(experts, self.upto(experts)),
            "vocab_size": 7 + self.upto(300),
            "eos_token_id": 2,
        }
        heads = self.one_of(1, 2, 3)
        vision = {
            "hidden_size": heads * 4 * self.upto(20),
            "num_heads": heads,
            "intermediate_size": self.width(),
            "out_hidden_size": hidden,
        }
        if partial:
            text |= {
                "n_routed_experts": experts,
                "n_group": 1,
                "rope_parameters": rope | {"partial_rotary_factor": 0.5},
            }
        else:
            text |= {"num_experts": experts, "rope_parameters": rope | {"mrope_interleaved": True}}
            vision["deepstack_visual_indexes"] = self.one_of([], [1], [0, 1])
        return TinyCheckpoint(model_type, text=text, vision=vision)


def answers(engine: Engine, model: ModelMetadata, cases: list[Case]) -> np.ndarray:
    """Logits of all positions of two prompts, one with an image, and of a step behind them: [N, vocabulary]."""
    images = pack(cases, model)
    assert images is not None
    prompts = [case.prompt for case in cases]
    batch = Batch(engine, model, prompts, [engine.encode(images)], BatchLimits.of(prompts, engine.limits))
    return np.concatenate([batch.prefill(every_position=True), batch.decode([6, 3])])


@pytest.mark.parametrize(
    ("model_type", "seed"), [("qwen3_vl_moe", 1), ("qwen3_vl_moe", 2), ("glm4v_moe", 3), ("gemma4", 4)]
)
def test_drawn_sizes_build_and_run_or_are_refused_before_they_are_traced(
    model_type: str, seed: int, tmp_path: Path
) -> None:
    checkpoint = Draw(seed).checkpoint(model_type).save(tmp_path / "checkpoint")
    with Checkpoint.open(checkpoint) as source:
        model = CanonicalModel.of(source)
    metadata = model.config.metadata()
    cases = random_cases(metadata, source.config, seed)[:2]
    expected = answers(TorchEngine(model, lambda engine: answers(engine, metadata, cases)), metadata, cases)
    built = []
    for name in (*EXACT, *ROUNDED):
        try:
            require_sizes(targets([name], {})[0], model.config, model.family)
        except BuildError:
            with pytest.raises(BuildError, match=f"{name} cannot run this model"):
                build(checkpoint, tmp_path / "refused", [name])
        else:
            built.append(name)
    bundle = build(checkpoint, tmp_path / "bundle", built)
    assert not (tmp_path / "refused").exists()
    for name in built:
        engine = load_engine(bundle, name, EngineOptions(threads=1))
        found = answers(engine, metadata, cases)
        engine.close()
        if name in EXACT:
            np.testing.assert_allclose(found, expected, atol=1e-3 * expected.std(), err_msg=name)
        else:  # a wrong place or a wrong width leaves nothing alike; rounding, with experts that flip, leaves 0.75
            assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.5, name


HEADS, HEAD_DIM, EXPERTS = cpu_limits.HEADS, cpu_limits.VALUE_DIM, cpu_limits.EXPERTS
TOO_MUCH = [
    ("cpu:int8", {"num_attention_heads": HEADS + 2}, f"num_attention_heads = {HEADS + 2} (allowed: up to {HEADS})"),
    ("cpu:int4", {"head_dim": HEAD_DIM + 2}, f"head_dim = {HEAD_DIM + 2} (allowed: a multiple of 2, up to {HEAD_DIM})"),
    ("cpu:int8", {"num_experts": EXPERTS + 1}, f"text_config.num_experts = {EXPERTS + 1} (allowed: up to {EXPERTS})"),
    ("ort-cpu", {"head_dim": 20}, "text_config.head_dim = 20 (allowed: a multiple of 8)"),
    ("ort-cpu:int8", {"head_dim": 20}, "text_config.head_dim = 20 (allowed: a multiple of 8)"),
    ("ort-cpu:int4", {"hidden_size": 40}, "text_config.hidden_size = 40 (allowed: a multiple of 16)"),
    ("ort-cpu:int8", {"moe_intermediate_size": 8}, "moe_intermediate_size = 8 (allowed: a multiple of 16)"),
]


@pytest.mark.parametrize(("name", "text", "told"), TOO_MUCH, ids=[f"{name} {told[:30]}" for name, _, told in TOO_MUCH])
def test_size_that_a_target_cannot_run_is_named_with_what_is_allowed(
    name: str, text: dict[str, int], told: str
) -> None:
    rotated = text.get("head_dim", 16) // 2
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [rotated, 0, 0], "mrope_interleaved": True}
    plain = {"moe_intermediate_size": 32, "rope_parameters": rope}
    vision = {"out_hidden_size": text.get("hidden_size", 32)}
    values = TinyCheckpoint(text=plain | text, vision=vision).config().to_dict()
    config = family_for(values).config(values)
    with pytest.raises(BuildError) as raised:
        require_sizes(targets([name], {})[0], config, family_for(values))
    assert str(raised.value).startswith(f"{name} cannot run this model: ")
    assert told in str(raised.value)
    require_sizes(targets(["reference"], {})[0], config, family_for(values))


WHERE_A_FAMILY_HAS_IT = [
    ("qwen3_omni_moe", {"num_attention_heads": 2 * HEADS}, "thinker_config.text_config.num_attention_heads = "),
    ("gemma4", {"head_dim": 2 * HEAD_DIM}, "text_config.head_dim = "),
    ("gemma4", {"global_head_dim": 2 * HEAD_DIM}, "text_config.global_head_dim = "),
    ("glm4v_moe", {"n_routed_experts": 2 * EXPERTS}, "text_config.n_routed_experts = "),
    ("qwen3_5_moe", {"linear_key_head_dim": 2 * cpu_limits.DELTA_DIM}, "text_config.linear_key_head_dim = "),
]


@pytest.mark.parametrize(
    ("model_type", "text", "told"), WHERE_A_FAMILY_HAS_IT, ids=[t for *_, t in WHERE_A_FAMILY_HAS_IT]
)
def test_size_is_named_as_its_family_names_it(
    model_type: str, text: dict[str, int], told: str, saved: dict[str, Path]
) -> None:
    values = json.loads((saved[model_type] / "config.json").read_text())
    inner = values.get("thinker_config", values)["text_config"]
    inner.pop("per_layer_config", None)  # as transformers 5.24 writes Gemma's heads
    inner |= text
    with pytest.raises(BuildError) as raised:
        require_sizes(targets(["cpu:int8"], {})[0], family_for(values).config(values), family_for(values))
    assert str(raised.value).startswith(f"cpu:int8 cannot run this model: {told}")


DIM, KERNEL = cpu_limits.DELTA_DIM, cpu_limits.CONVOLUTION
TOO_MUCH_OF_A_STATE = [
    ({"key_heads": HEADS + 1, "value_heads": HEADS + 1}, f"linear_num_value_heads = {HEADS + 1} (allowed: up to"),
    ({"key_dim": DIM + 2}, f"linear_key_head_dim = {DIM + 2} (allowed: a multiple of 2, up to {DIM})"),
    ({"value_dim": 5}, f"linear_value_head_dim = 5 (allowed: a multiple of 2, up to {DIM})"),
    ({"kernel": KERNEL + 1}, f"linear_conv_kernel_dim = {KERNEL + 1} (allowed: up to {KERNEL})"),
]


@pytest.mark.parametrize(("changed", "told"), TOO_MUCH_OF_A_STATE, ids=[told[:30] for _, told in TOO_MUCH_OF_A_STATE])
def test_size_of_linear_attention_that_cpu_cannot_run_is_named(changed: dict[str, int], told: str) -> None:
    values = TinyCheckpoint().config().to_dict()
    config = family_for(values).config(values)
    mixer = GatedDeltaConfig(**{"key_heads": 1, "value_heads": 2, "key_dim": 8, "value_dim": 8, "kernel": 4} | changed)
    layers = tuple(replace(layer, mixer=mixer) for layer in config.decoder.layers)
    config = replace(config, decoder=replace(config.decoder, layers=layers))
    with pytest.raises(BuildError) as raised:
        require_sizes(targets(["cpu:int8"], {})[0], config, family_for(values))
    assert told in str(raised.value)
