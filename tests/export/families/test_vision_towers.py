"""Every tower of a family, with its projector: against transformers, and the engines' graphs of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.prune_2_4 import prunable
from tests.support.aria_tower import TinyAriaTower
from tests.support.gemma4_tower import TinyGemma4Tower
from tests.support.internvl_tower import TinyInternVLTower
from tests.support.llama4_tower import TinyLlama4Tower
from tests.support.moon_tower import TinyMoonTower
from tests.support.pixtral_tower import TinyPixtralTower
from tests.support.vision_towers import (
    TinyTower,
    as_on_gpus,
    assert_builds_a_plan,
    in_onnxruntime,
    in_torch,
    lowered,
    traced,
)

TOWERS: dict[str, type[TinyTower]] = {
    "aria": TinyAriaTower,
    "gemma4": TinyGemma4Tower,
    "internvl": TinyInternVLTower,
    "kimi_k25": TinyMoonTower,
    "llama4": TinyLlama4Tower,
    "mistral3": TinyPixtralTower,
}
FIRST = [(family, tower.PLANNED or next(iter(tower.CONFIGURATIONS))) for family, tower in TOWERS.items()]
CONFIGURATIONS = [(family, name) for family, tower in TOWERS.items() for name in tower.CONFIGURATIONS]

families = pytest.mark.parametrize("family", TOWERS)
towers = pytest.mark.parametrize(
    ("family", "name"), CONFIGURATIONS, ids=[f"{family}: {name}" for family, name in CONFIGURATIONS]
)


@towers
def test_images_in_one_call_are_those_of_transformers(family: str, name: str) -> None:
    tower = TOWERS[family].of(name)
    inputs = tower.images()
    ours = in_torch(tower.ours, inputs)
    assert ours.shape == (sum(tower.tokens), tower.OUT)
    assert relative_error(ours, tower.wanted(inputs)) < 1e-5


@towers
def test_images_in_one_call_equal_single_calls(family: str, name: str) -> None:
    tower = TOWERS[family].of(name, seed=1)
    inputs = tower.images()
    singles = [in_torch(tower.ours, inputs.part(image, image + 1)) for image in range(len(tower.sizes))]
    assert relative_error(in_torch(tower.ours, inputs), np.concatenate(singles)) < 1e-6


@towers
def test_the_graph_has_the_modules_numbers(family: str, name: str) -> None:
    tower = TOWERS[family].of(name, seed=2)
    inputs, graph = tower.images(), traced(tower.ours, tower.weights)
    assert {value.name for value in graph.graph.inputs} == {*tower.metadata.inputs, "image_start"}
    wanted = in_torch(tower.ours, inputs)
    assert relative_error(in_onnxruntime(graph, inputs), wanted) < 1e-5
    first, second = tower.tokens[:2]
    assert relative_error(in_onnxruntime(graph, inputs.part(1, 2)), wanted[first : first + second]) < 1e-5


@families
@pytest.mark.parametrize("target", ["ort-cpu", "cpu:int8", "ort-cpu:int4"])
def test_cpu_engines_cost_their_rounding(family: str, target: str) -> None:
    tower = TOWERS[family].of(TOWERS[family].WIDE, seed=3)
    graph, inputs = lowered(traced(tower.ours, tower.weights), target), tower.images()
    limit = 1e-5 if target == "ort-cpu" else tower.ROUNDING
    assert relative_error(in_onnxruntime(graph, inputs), tower.wanted(inputs)) < limit


@families
def test_an_image_has_the_same_bits_alone_on_a_cpu(family: str) -> None:
    """Also one with fewer patches, or visual tokens, than threads, where ONNX Runtime may add in another order."""
    tower = TOWERS[family].of(TOWERS[family].WIDE, seed=3)
    graph, inputs = lowered(traced(tower.ours, tower.weights), "cpu:int8"), tower.images()
    parts = (inputs.part(image, image + 1) for image in range(len(tower.sizes)))
    singles = [in_onnxruntime(graph, part, threads=8) for part in parts]
    np.testing.assert_array_equal(in_onnxruntime(graph, inputs, threads=8), np.concatenate(singles))


@pytest.mark.parametrize(("family", "name"), FIRST)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.05)])
def test_graphs_for_tensorrt_cost_their_rounding(family: str, name: str, dtype: str, limit: float) -> None:
    tower = TOWERS[family].of(name, seed=4)
    inputs, graph = tower.images(), traced(tower.ours, tower.weights)
    assert relative_error(as_on_gpus(graph, dtype, inputs), in_torch(tower.ours, inputs)) < limit


@families
def test_pruning_leaves_the_embedding_of_patches_as_it_is(family: str) -> None:
    tower = TOWERS[family].of(TOWERS[family].WIDE)
    matrices = {name for name, weight in tower.weights.items() if len(weight.shape) == 2}
    assert matrices > tower.UNPRUNED
    assert {value.name for value in prunable(traced(tower.ours, tower.weights))} == matrices - tower.UNPRUNED


@pytest.mark.parametrize("family", ["gemma4", "internvl", "llama4"])
def test_tensorrt_rtx_builds_a_plan(family: str, tmp_path: Path) -> None:
    """Of the other towers one is built with that of their decoder, in the families' own files."""
    tower = TOWERS[family].of(TOWERS[family].PLANNED or TOWERS[family].WIDE, seed=5)
    assert_builds_a_plan(traced(tower.ours, tower.weights), tower.metadata, tower.ours.config.depth, tmp_path)
