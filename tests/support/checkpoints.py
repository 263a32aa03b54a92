"""Saved checkpoints of every family, and how a refusal of one has to look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel
from moevlm.runtime.core.errors import MoevlmError

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
