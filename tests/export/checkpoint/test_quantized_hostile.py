"""Published layouts with one thing off: each is refused by name, or its weights are the right ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel
from moevlm.runtime.core.errors import MoevlmError
from tests.support.published import FORMATS, WEIGHTS, floats
from tests.support.quantized import Tensors

DRAWN = 4  # of a layout
CHECKED = ("attention.q.weight", "feed_forward.gate_up", "feed_forward.down")
# What no shape and no dtype tells: codes of other bits, the zeros of another convention.
UNSEEN = ("checkpoint_format",)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return floats("qwen3_vl_moe", tmp_path_factory.mktemp("floats") / "checkpoint")


def weights(directory: Path) -> dict[str, np.ndarray]:
    with Checkpoint.open(directory) as source:
        found = CanonicalModel.of(source).decoder_weights
        return {name: read(found[name]) for name in (f"layers.0.{part}" for part in CHECKED)}


def tensors_off(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """One tensor lost, cut, grown, turned, with an axis more, in a dtype that stands for nothing, or not finite."""
    of_codes = [name for name in sorted(tensors) if "layers.0" in name and "language_model" in name]
    of_codes = [name for name in of_codes if ("_proj" in name and "weight_" not in name) or "scale" in name]
    for name in of_codes:
        tensor = tensors[name]
        changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"an axis": lambda t: t[None]}
        if tensor.dim() and len(tensor) > 1:
            changes |= {"cut": lambda t: t[:-1], "grown": lambda t: torch.cat([t, t[:1]])}
        if tensor.dim() > 1 and tensor.shape[-1] != tensor.shape[-2]:
            changes |= {"turned": lambda t: t.mT, "narrowed": lambda t: t[..., :-1]}
        if tensor.dtype != torch.uint8:
            changes["as float64"] = lambda t: t.to(torch.float64)
        if tensor.is_floating_point():
            changes["not finite"] = lambda t: torch.full_like(t.float(), float("nan")).to(t.dtype)
        yield f"{name} lost", {other: found for other, found in tensors.items() if other != name}
        for told, change in changes.items():
            yield f"{name} {told}", tensors | {name: change(tensor).contiguous()}


def fields_off(section: dict) -> Iterator[tuple[str, dict]]:
    """One field of the config lost, negated or doubled."""
    for key, value in section.items():
        if key in UNSEEN:
            continue
        yield f"without {key}", {other: found for other, found in section.items() if other != key}
        if isinstance(value, bool):
            yield f"{key} negated", section | {key: not value}
        elif isinstance(value, int):
            yield f"{key} doubled", section | {key: 2 * value}
        elif isinstance(value, dict):
            yield from ((told, section | {key: inner}) for told, inner in fields_off(value))


@pytest.mark.parametrize("name", FORMATS)
def test_a_layout_with_one_thing_off_is_refused_or_right(name: str, original: Path, tmp_path: Path) -> None:
    published, quantized = FORMATS[name], tmp_path / "quantized"
    published.publish(original, quantized, tmp_path / "plain")
    exact, stored = weights(tmp_path / "plain"), load_file(quantized / WEIGHTS)
    whole = json.loads((quantized / published.file).read_text())
    section = whole
    for key in published.path:
        section = section[key]
    rng, refused = random.Random(name), 0
    for told, changed in rng.sample(list(tensors_off(stored)), DRAWN) + rng.sample(list(fields_off(section)), 1):
        if told.startswith("model."):
            save_file(changed, quantized / WEIGHTS)
        else:
            save_file(stored, quantized / WEIGHTS)
            _put(quantized / published.file, whole, published.path, changed)
        try:
            found = weights(quantized)
        except MoevlmError as error:
            refused += 1
            assert "\n" not in str(error), told
            continue
        for part in CHECKED:
            np.testing.assert_array_equal(found[f"layers.0.{part}"], exact[f"layers.0.{part}"], f"{told}, {part}")
    assert refused


def _put(file: Path, whole: dict, path: tuple[str, ...], section: dict) -> None:
    changed = json.loads(json.dumps(whole))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = section
    file.write_text(json.dumps(changed))
