"""Quantized checkpoints that cannot be read are refused in one line that names the tensor or the field."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moevlm.runtime.core.errors import CheckpointError
from tests.support.checkpoints import canonical, refused
from tests.support.published import FORMATS, floats
from tests.support.tiny import edit_json, edit_tensors

Tensors = dict[str, torch.Tensor]
Q = "model.language_model.layers.0.self_attn.q_proj"
EXPERTS = "model.language_model.layers.1.mlp.experts"
UP = f"{EXPERTS}.2.up_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture
def published(root: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint in FORMATS[name] that may be damaged."""

    def copy(name: str) -> Path:
        if not (root / "floats").exists():
            floats("qwen3_vl_moe", root / "floats")
        if not (root / name).exists():
            FORMATS[name].publish(root / "floats", root / name, root / f"{name}-plain")
        return Path(shutil.copytree(root / name, tmp_path / "checkpoint"))

    return copy


def set_item(name: str, place: tuple[int, ...], value: int) -> Callable[[Tensors], object]:
    """Change one item's bits."""

    def change(tensors: Tensors) -> None:
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensors[name].element_size()]
        tensors[name].view(bits)[place] = value

    return change


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


DAMAGE: dict[str, tuple[str, Callable[[Tensors], object], tuple[str, ...]]] = {
    "no-scale-fp8": (
        "fp8-blocks",
        drop(f"{UP}.weight_scale_inv"),
        (f"tensor {UP}.weight has dtype float8_e4m3fn, and the checkpoint lacks {UP}.weight_scale_inv",),
    ),
    "no-scale-of-all-nvfp4": (
        "nvfp4",
        drop(f"{UP}.weight_scale_2"),
        (f"tensor {UP}.weight has dtype uint8, and the checkpoint lacks {UP}.weight_scale_2",),
    ),
    "no-scale-packed": (
        "int4-32",
        drop(f"{UP}.weight_scale"),
        (f"tensor {UP}.weight_packed has dtype int32, and the checkpoint lacks {UP}.weight_scale",),
    ),
    "no-scale-gptq": ("gptq-128", drop(f"{UP}.scales"), (f"tensor {UP}.qweight has dtype int32", f"lacks {UP}.scales")),
    "no-zero-points": (
        "int4-128-zeros",
        drop(f"{UP}.weight_zero_point"),
        (
            f"the checkpoint lacks tensor {UP}.weight_zero_point",
            "quantization_config says that weights are not symmetric",
        ),
    ),
    "scale-without-codes": (
        "fp8-blocks",
        drop(f"{UP}.weight"),
        (f"the checkpoint lacks tensor {UP}.weight",),
    ),
    "scale-of-a-stranger": (
        "nvfp4",
        lambda tensors: tensors.update(
            {"model.language_model.layers.7.mlp.experts.0.up_proj.weight_scale": torch.ones(2)}
        ),
        ("without a place in the model: 1 tensor of the checkpoint, first model.language_model.layers.7.mlp.exp",),
    ),
    "scale-beside-floats": (
        "fp8-blocks",
        replaced(f"{UP}.weight", lambda tensor: tensor.to(torch.bfloat16)),
        (f"tensor {UP}.weight has dtype bfloat16, and a scale, {UP}.weight_scale_inv",),
    ),
    "two-scales": (
        "fp8-blocks",
        lambda tensors: tensors.update({f"{UP}.weight_scale": torch.ones(320, 1)}),
        (f"tensor {UP}.weight has two scales, _scale and _scale_inv (allowed: one of them)",),
    ),
    "codes-and-floats": (
        "int4-32",
        lambda tensors: tensors.update({f"{UP}.weight": torch.ones(320, 256)}),
        (f"the checkpoint has both {UP}.weight and {UP}.weight_packed (allowed: one of them)",),
    ),
    "shape-of-scale-fp8": (
        "fp8-blocks",
        replaced(f"{Q}.weight_scale_inv", lambda _: torch.ones(3, 2)),
        (f"tensor {Q}.weight_scale_inv has shape [3, 2] (allowed: [1, 2] for blocks of 128 x 128, [128, 1] for rows",),
    ),
    "grid-that-lost-blocks": (
        "fp8-blocks",
        replaced(f"{Q}.weight_scale_inv", lambda tensor: tensor[:, :1]),
        (f"tensor {Q}.weight_scale_inv has shape [1, 1] (allowed: [1, 2] for blocks of 128 x 128, [128, 1] for rows",),
    ),
    "no-index-of-scattered-groups": (
        "gptq-act-order",
        drop(f"{Q}.g_idx"),
        (f"the checkpoint lacks tensor {Q}.g_idx, though", "says that weights are ordered by activations"),
    ),
    "one-scale-that-is-no-number": (
        "nvfp4",
        replaced(f"{Q}.weight_scale_2", lambda tensor: tensor * float("nan")),
        (f"tensor {Q}.weight_scale_2 is not finite at []: the file is damaged",),
    ),
    "one-scale-for-blocks-of-experts": (
        "fp8-blocks-fused",
        replaced(f"{EXPERTS}.down_proj_scale_inv", lambda _: torch.tensor(1.0)),
        (f"tensor {EXPERTS}.down_proj_scale_inv has shape [] (allowed: [4, 2, 3] for blocks of 128 x 128, ",),
    ),
    "shape-of-scale-nvfp4": (
        "nvfp4",
        replaced(f"{Q}.weight_scale", lambda tensor: tensor[:, :-1]),
        (f"tensor {Q}.weight_scale has shape [128, 15] (allowed: [128, 16])",),
    ),
    "shape-of-zero-points": (
        "int4-128-zeros",
        replaced(f"{Q}.weight_zero_point", lambda tensor: tensor[:-1]),
        (f"tensor {Q}.weight_zero_point has shape [15, 2] (allowed: [16, 2])",),
    ),
    "groups-of-another-size": (
        "gptq-128",
        replaced(f"{Q}.scales", lambda tensor: tensor.repeat(2, 1)),
        (f"tensor {Q}.scales has shape [4, 128] (allowed: 2 groups of 128 in the place of 4, for rows of 256)",),
    ),
    "dtype-of-scale": (
        "nvfp4",
        replaced(f"{Q}.weight_scale", lambda tensor: tensor.float()),
        (f"tensor {Q}.weight_scale has dtype float32 (allowed: float8_e4m3fn)",),
    ),
    "stated-shape": (
        "int4-32",
        replaced(f"{Q}.weight_shape", lambda _: torch.tensor([128, 1 << 40])),
        (f"tensor {Q}.weight_shape holds [128, 1099511627776]", "[128, 'columns'], as many rows as"),
    ),
    "code-that-is-not-a-number": (
        "fp8-blocks",
        set_item(f"{Q}.weight", (3, 5), 0x7F),
        (f"tensor {Q}.weight is not finite at [3, 5]: the file is damaged",),
    ),
    "scale-that-is-not-a-number": (
        "gptq-128",
        set_item(f"{Q}.scales", (1, 7), 0x7E00),
        (f"tensor {Q}.scales is not finite at [1, 7]: the file is damaged",),
    ),
    "exponent-that-is-not-a-number": (
        "mxfp8",
        set_item(f"{Q}.weight_scale_inv", (0, 0), 255),
        (f"tensor {Q}.weight_scale_inv holds the exponent 255, which is not a number (allowed: 0 to 254)",),
    ),
    "global-scale-of-zero": (
        "nvfp4-compressed",
        set_item(f"{Q}.weight_global_scale", (), 0),
        (f"tensor {Q}.weight_global_scale holds 0 (allowed: a number other than 0, for it divides)",),
    ),
    "zero-of-sixteen": (
        "gptq-32-zeros",
        set_item(f"{Q}.qzeros", (0, 0), 0x7777777F),
        (f"tensor {Q}.qzeros holds 15, which would be the zero 16 (allowed: 0 to 14)",),
    ),
    "zero-though-symmetric": (
        "gptq-128",
        set_item(f"{Q}.qzeros", (0, 0), 0x77777774),
        (f"tensor {Q}.qzeros holds the zero 5 (allowed: 8, for the config says that weights are symmetric)",),
    ),
    "group-that-is-not-there": (
        "gptq-act-order",
        set_item(f"{Q}.g_idx", (9,), 8),
        (f"tensor {Q}.g_idx holds the group 8 (allowed: 0 to 7)",),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tensor_is_refused_by_name(name: str, published: Callable[[str], Path]) -> None:
    format_, change, words = DAMAGE[name]
    directory = published(format_)
    edit_tensors(directory, change)
    refused(CheckpointError, *words, act=lambda: canonical(directory))


def test_codes_without_a_config_are_refused(published: Callable[[str], Path]) -> None:
    directory = published("fp8-blocks")
    edit_json(directory / "config.json", lambda config: config.pop("quantization_config"))
    refused(CheckpointError, f"tensor {Q}.weight has dtype float8_e4m3fn", act=lambda: canonical(directory))


def test_names_of_gptq_need_its_config(published: Callable[[str], Path]) -> None:
    directory = published("gptq-128")
    edit_json(directory / "config.json", lambda c: c.update(quantization_config=FORMATS["fp8-blocks"].config))
    refused(
        CheckpointError,
        ".qweight is of a format that the config's quant_method does not have",
        act=lambda: canonical(directory),
    )
