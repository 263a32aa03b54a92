"""Saved checkpoints: their tensors and fields, changed or as they are, and how a refusal of one has to look."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel
from moevlm.runtime.core.errors import MoevlmError
from tests.support.tiny import edit_tensors

FAMILIES = ("qwen3_vl_moe", "glm4v_moe", "qwen3_5_moe")
ATTENDING = ("qwen3_vl_moe", "glm4v_moe")  # every layer has keys and values, and nothing else
families = pytest.mark.parametrize("model_type", FAMILIES)


def refused(kind: type[MoevlmError], *words: str, act: Callable[[], Any]) -> None:
    """`act` raises exactly `kind`, in one line that has all the words."""
    with pytest.raises(kind) as raised:
        act()
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def canonical(directory: Path, layout: str = "auto") -> dict[str, np.ndarray]:
    with Checkpoint.open(directory) as checkpoint:
        model = CanonicalModel.of(checkpoint, layout)
    return {
        f"{tower}.{name}": read(weight)
        for tower, weights in (("vision", model.vision_weights), ("decoder", model.decoder_weights))
        for name, weight in weights.items()
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def names(directory: Path) -> set[str]:
    """Of the tensors of a checkpoint in one file."""
    with safe_open(directory / "model.safetensors", "np") as file:
        return set(file.keys())


def renamed(directory: Path, spell: Callable[[str], str]) -> Path:
    """The same checkpoint, each tensor under another name."""
    edit_tensors(directory, lambda tensors: tensors.update({spell(name): tensors.pop(name) for name in list(tensors)}))
    return directory


def with_field(checkpoint: Path, path: str, value: Any) -> dict[str, Any]:
    """config.json with one field of another value. path: its dotted name."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    place, *keys = config, *path.split(".")
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return config
