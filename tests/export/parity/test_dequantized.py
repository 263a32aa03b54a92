"""Parity's own reading of quantized checkpoints: what the definitions say, and a fault of the loader shows in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moevlm.export.build import build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.checkpoint.quantized import awq, nvfp4
from moevlm.export.checkpoint.quantized.reader import plain_tensors
from moevlm.export.graph.weights import read
from moevlm.export.parity.dequantized import dequantized
from moevlm.export.parity.run import check_parity
from tests.support.published import FORMATS, WEIGHTS, floats
from tests.support.tiny import edit_json, edit_tensors


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return floats("qwen3_vl_moe", tmp_path_factory.mktemp("floats") / "checkpoint")


@pytest.mark.parametrize("name", FORMATS)
def test_two_readers_that_share_nothing_agree(name: str, original: Path, tmp_path: Path) -> None:
    assert_agree(FORMATS[name].publish(original, tmp_path / "q", tmp_path / "plain"), tmp_path / "plain")


def assert_agree(quantized: Path, floats: Path) -> None:
    with Checkpoint.open(quantized) as source, Checkpoint.open(floats) as plain:
        found, loaded = dequantized(source), plain_tensors(source).tensors
        for tensor in plain.tensors.values():
            wanted = tensor.rows(0, tensor.shape[0])
            for reader in (found, loaded):
                assert reader[tensor.name].shape == tensor.shape, tensor.name
                np.testing.assert_allclose(read(reader[tensor.name]), wanted, rtol=2e-7, err_msg=tensor.name)


@pytest.mark.parametrize("ending", [".qscale_weight", ".scale"])
def test_scales_have_several_names(ending: str, original: Path, tmp_path: Path) -> None:
    quantized = FORMATS["fp8-modelopt"].publish(original, tmp_path / "q", tmp_path / "plain")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name.replace(".weight_scale", ending)] = tensors.pop(name)

    edit_tensors(quantized, rename)
    assert_agree(quantized, tmp_path / "plain")


def test_modules_of_gptq_may_have_other_bits(original: Path, tmp_path: Path) -> None:
    layer = "model.language_model.layers.1."
    for name in ("gptq-128", "gptq-8-bits"):
        FORMATS[name].publish(original, tmp_path / name / "q", tmp_path / name / "plain")
    for part in ("q", "plain"):
        theirs = load_file(tmp_path / "gptq-8-bits" / part / WEIGHTS)
        eight = {name: tensor for name, tensor in theirs.items() if name.startswith(layer)}
        edit_tensors(tmp_path / "gptq-128" / part, lambda tensors, eight=eight: tensors.update(eight))
    quantized = tmp_path / "gptq-128" / "q"
    other = {"+:.*layers\\.1\\..*": {"bits": 8, "group_size": 64}}
    edit_json(quantized / "config.json", lambda config: config["quantization_config"].update(dynamic=other))
    assert_agree(quantized, tmp_path / "gptq-128" / "plain")


def test_awq_without_zeros_is_symmetric(original: Path, tmp_path: Path) -> None:
    quantized = FORMATS["awq-32"].publish(original, tmp_path / "q", tmp_path / "plain")
    edit_json(quantized / "config.json", lambda config: config["quantization_config"].update(zero_point=False))
    edit_tensors(quantized, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(".qzeros")])
    with Checkpoint.open(quantized) as source:
        found, loaded = dequantized(source), plain_tensors(source).tensors
        assert found.keys() == loaded.keys()
        for name, weight in loaded.items():
            np.testing.assert_allclose(read(found[name]), read(weight), rtol=2e-7, err_msg=name)


def test_fused_fp4_experts_may_be_turned_and_have_two_scales(original: Path, tmp_path: Path) -> None:
    """As ModelOpt writes experts that are [E, in, out], gate and up apart."""
    quantized = FORMATS["nvfp4-fused"].publish(original, tmp_path / "q", tmp_path / "plain")
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in (name, f"{name}_weight_scale"):
            tensors[part] = tensors[part].view(torch.uint8).mT.contiguous().view(tensors[part].dtype)
        whole = tensors[f"{name}_weight_scale_2"]
        tensors[f"{name}_weight_scale_2"] = torch.stack([whole, 2 * whole], 1)[..., None]

    edit_tensors(quantized, change)
    with Checkpoint.open(quantized) as source, Checkpoint.open(tmp_path / "plain") as plain:
        wanted = read(plain.tensors[name]).swapaxes(1, 2).copy()
        wanted[..., wanted.shape[2] // 2 :] *= 2
        for tensors in (dequantized(source), plain_tensors(source).tensors):
            assert tensors[name].shape == wanted.shape
            np.testing.assert_allclose(read(tensors[name]), wanted, rtol=2e-7)


@pytest.mark.parametrize("fault", ["none", "order of nibbles", "global scale turned over"])
def test_a_faulty_loader_fails_parity(
    fault: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "awq-32" if fault == "order of nibbles" else "nvfp4"
    quantized = FORMATS[name].publish(original, tmp_path / "q", tmp_path / "plain")
    if fault == "order of nibbles":
        monkeypatch.setattr(awq, "_NIBBLE", tuple(range(8)))
    elif fault != "none":
        right = nvfp4.NVFP4._of_all
        monkeypatch.setattr(nvfp4.NVFP4, "_of_all", lambda *arguments: 1 / right(*arguments))
    built = build(quantized, tmp_path / "b", ["reference"])
    assert check_parity(built.directory, quantized, quick=True).passed == (fault == "none")
