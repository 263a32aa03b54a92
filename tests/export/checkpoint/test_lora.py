"""LoRA adapters as PEFT saves them: merged as PEFT merges them, and what is refused."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moevlm.export.build import add_targets, build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.checkpoint.lora.adapter import CONFIG, WEIGHTS
from moevlm.export.dry_run import dry_run
from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.run import check_parity
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from tests.support.command_line import assert_refused, call
from tests.support.tiny import TinyCheckpoint, edit_json, edit_tensors

OPTIONS = {
    "r": 4,
    "lora_alpha": 7,
    "target_modules": r".*(q_proj|o_proj|visual.*qkv|linear_fc1)$",
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "rank_pattern": {r"layers\.1\.self_attn.q_proj": 2},
    "alpha_pattern": {"o_proj": 3},
}
TOLERANCE = 1e-6


def model_of(checkpoint: Path) -> torch.nn.Module:
    has_vision = hasattr(transformers.AutoConfig.from_pretrained(checkpoint), "vision_config")
    kind = transformers.AutoModelForImageTextToText if has_vision else transformers.AutoModelForCausalLM
    return kind.from_pretrained(checkpoint, dtype=torch.float32)


def adapter_for(checkpoint: Path, directory: Path, seed: int = 0, **options: object) -> Path:
    """A random adapter, saved by PEFT."""
    wrapped = peft.get_peft_model(model_of(checkpoint), peft.LoraConfig(**OPTIONS | options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    wrapped.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyCheckpoint(side_files=True).save(tmp_path_factory.mktemp("lora") / "checkpoint")


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_for(checkpoint, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """An adapter of one's own."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@contextmanager
def edited(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    tensors = load_file(path / WEIGHTS)
    yield tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)


def weights(checkpoint: Path, adapter: Path | None = None) -> dict[str, np.ndarray]:
    with Checkpoint.open(checkpoint, adapter) as source:
        model = CanonicalModel.of(source)
        both = ((f"vision.{n}", w) for n, w in model.vision_weights.items()), model.decoder_weights.items()
        return {name: read(weight) for each in both for name, weight in each}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen3_vl_moe", {}),
        ("qwen3_vl_moe", {"use_rslora": True, "rank_pattern": {}, "alpha_pattern": {}}),
        ("glm4v_moe", {"target_modules": ["k_proj", "qkv"], "rank_pattern": {}}),
    ],
    ids=["qwen3_vl_moe", "root of the rank", "glm4v_moe"],
)
def test_merged_weights_are_those_of_peft(model_type: str, options: dict, tmp_path: Path) -> None:
    plain = TinyCheckpoint(model_type, hub=model_type == "qwen3_vl_moe").save(tmp_path / "plain")
    adapter = adapter_for(plain, tmp_path / "adapter", seed=1, **options)
    merged = peft.PeftModel.from_pretrained(model_of(plain), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found, wanted, before = weights(plain, adapter), weights(tmp_path / "merged"), weights(plain)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=TOLERANCE * np.abs(array).max(), err_msg=name)
    changed = {name for name, array in found.items() if (array != before[name]).any()}
    assert sum(".feed_forward.gate_up" in name for name in changed) >= 1
    assert sum(".feed_forward.down" in name and before[name].ndim == 3 for name in changed) >= 1
    assert any(name.startswith("vision.") for name in changed)


@pytest.mark.parametrize("model_type", ["aria", "gpt_oss"])
def test_square_experts_that_lie_the_other_way_round_take_their_updates(model_type: str, tmp_path: Path) -> None:
    """The shape of down tells nothing. In gpt-oss gate and up rows take turns in the updates, too."""
    plain = TinyCheckpoint(model_type, text={"intermediate_size": 32}).save(tmp_path / "plain")
    adapter = adapter_for(plain, tmp_path / "adapter", seed=2)
    peft.PeftModel.from_pretrained(model_of(plain), adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    found, wanted, before = weights(plain, adapter), weights(tmp_path / "merged"), weights(plain)
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=TOLERANCE * np.abs(array).max(), err_msg=name)
    changed = {name for name, array in found.items() if (array != before[name]).any()}
    assert {f"layers.{i}.feed_forward.{name}" for i in (0, 1) for name in ("gate_up", "down")} <= changed
    assert any(name.startswith("vision.") for name in changed) == (model_type == "aria")
    bundle = build(plain, tmp_path / "b", ["reference"], lora=adapter).directory
    assert check_parity(bundle, plain, lora=adapter, quick=True).passed


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_adapters_of_decoders_alone_are_merged_as_peft_does(model_type: str, tmp_path: Path) -> None:
    """Mixtral's router and experts have other names on disk than in the adapter."""
    plain = TinyCheckpoint(model_type).save(tmp_path / "plain")
    adapter = adapter_for(plain, tmp_path / "adapter", seed=3, target_modules=["q_proj", "o_proj"])
    peft.PeftModel.from_pretrained(model_of(plain), adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    found, wanted, before = weights(plain, adapter), weights(tmp_path / "merged"), weights(plain)
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=TOLERANCE * np.abs(array).max(), err_msg=name)
    changed = {name for name, array in found.items() if (array != before[name]).any()}
    assert {f"layers.1.feed_forward.{name}" for name in ("gate_up", "down")} <= changed


def test_experts_one_by_one_on_disk_take_the_updates_of_fused_ones(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    apart = Path(shutil.copytree(checkpoint, tmp_path / "apart"))

    def split(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            base, fused = name.rsplit(".", 1)[0], tensors.pop(name)
            for e, expert in enumerate(fused):
                parts = (
                    dict(zip(("gate", "up"), expert.chunk(2), strict=True)) if "gate_up" in name else {"down": expert}
                )
                tensors |= {f"{base}.{e}.{part}_proj.weight": matrix for part, matrix in parts.items()}

    edit_tensors(apart, split)
    found, wanted = weights(apart, adapter), weights(checkpoint, adapter)
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_bundle_with_an_adapter_passes_parity_with_it_alone(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    built = build(checkpoint, bundle, ["reference"], lora=adapter)
    assert {f"adapter/{CONFIG}", f"adapter/{WEIGHTS}"} <= built.manifest.source.keys()
    assert check_parity(bundle, checkpoint, lora=adapter, quick=True).passed
    with pytest.raises(CheckpointError, match="the bundle has a LoRA adapter in its weights: name it with --lora"):
        check_parity(bundle, checkpoint, quick=True)
    other = adapter_for(checkpoint, tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match=f"{other / WEIGHTS} is not the file that the bundle was exported from"):
        add_targets(bundle, checkpoint, ["cpu:int8"], lora=other)
    plain = build(checkpoint, tmp_path / "plain", ["reference"])
    with pytest.raises(CheckpointError, match="the bundle has no LoRA adapter in its weights"):
        check_parity(plain.directory, checkpoint, lora=adapter, quick=True)


def test_adapter_changes_what_parity_compares(checkpoint: Path, adapter: Path) -> None:
    merged, plain = weights(checkpoint, adapter), weights(checkpoint)
    assert np.abs(merged["layers.0.attention.q.weight"] - plain["layers.0.attention.q.weight"]).max() > 0.1


def test_dry_run_finds_a_place_for_every_update(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    assert dry_run(checkpoint, ["cpu:int8"], lora=adapter).targets[0].refused == ""
    with pytest.raises(CheckpointError, match="an adapter needs the weights that it is for"):
        dry_run(shutil.copy(checkpoint / "config.json", tmp_path), ["cpu:int8"], lora=adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "unsupported value in adapter_config.json: use_dora = true (supported: off)"),
        ({"peft_type": "LOHA"}, 'peft_type = "LOHA" (supported: "LORA")'),
        ({"bias": "all"}, 'bias = "all" (supported: "none")'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
        ({"rank_pattern": {"(a+)+": 4}}, 'adapter_config.json: rank_pattern: "(a+)+" (supported: regular expressions'),
        ({"r": 0}, "invalid value in adapter_config.json: r = 0 (allowed: an integer from 1 to 16384)"),
        ({"lora_alpha": "x"}, 'lora_alpha = "x" (allowed: a number above 0)'),
        ({"r": 3}, "(its rank is 3)"),
    ],
)
def test_option_of_another_method_is_refused_by_name(copy: Path, checkpoint: Path, change: dict, message: str) -> None:
    edit_json(copy / CONFIG, lambda config: config.update(change))
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        weights(checkpoint, copy)
    assert message in str(caught.value)


def test_update_without_a_place_is_refused_by_name(copy: Path, checkpoint: Path) -> None:
    with edited(copy) as tensors:
        for end in ("lora_A.weight", "lora_B.weight"):
            moved = "base_model.model.model.language_model.layers.9.self_attn.q_proj."
            own = tensors[f"base_model.model.model.language_model.layers.0.self_attn.q_proj.{end}"]
            tensors[moved + end] = own.clone()
    with pytest.raises(CheckpointError, match="updates without a place in the model: 1, first model"):
        weights(checkpoint, copy)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("base_model.model.lm_head.lora_embedding_A", (4, 7), "cannot be merged (allowed: lora_A and lora_B"),
        ("base_model.model.model.x.lora_magnitude_vector", (4,), "cannot be merged"),
        ("base_model.model.model.x.lora_A.weight", (4, 8), "the adapter's model.x has lora_A [4, 8]"),
        (
            "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
            (4, 31),
            "is for [64, 31], the weight is [64, 32]",
        ),
    ],
)
def test_tensor_that_does_not_fit_is_refused_by_name(
    copy: Path, checkpoint: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    with edited(copy) as tensors:
        tensors[name] = torch.ones(shape)
    with pytest.raises(CheckpointError) as caught:
        weights(checkpoint, copy)
    assert message in str(caught.value)


def test_command_merges_and_suggests_parity_with_the_adapter(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    said = call("build", checkpoint, "-o", tmp_path / "b", "--lora", adapter, "--target", "reference")
    assert said.status == 0, said
    assert f"--checkpoint {checkpoint} --lora {adapter}" in said.out
    missing = tmp_path / "none"
    assert_refused(
        call("build", checkpoint, "-o", tmp_path / "c", "--lora", missing), f"no adapter directory at {missing}"
    )
    assert not (tmp_path / "c").exists()
