"""The Pixtral tower with Mistral 3's projector against transformers, and the engines' graphs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.families.fields import Fields
from moevlm.export.families.pixtral import pixtral_tower
from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.prune_2_4 import prunable
from moevlm.runtime.core.errors import CheckpointError, FieldError, UnsupportedModelError
from tests.support.pixtral_tower import CONFIGURATIONS, EPSILON, OUT, SIZES, VISION, TinyTower
from tests.support.vision_towers import (
    as_on_gpus,
    assert_builds_a_plan,
    in_onnxruntime,
    in_torch,
    lowered,
    random_images,
    traced,
)

towers = pytest.mark.parametrize("name", CONFIGURATIONS)


@towers
def test_images_of_different_sizes_in_one_call_are_those_of_transformers(name: str) -> None:
    tower = TinyTower.of(name)
    inputs = random_images(tower.metadata, SIZES)
    ours = in_torch(tower.ours, inputs)
    assert ours.shape == (sum(h * w for h, w in SIZES), OUT)
    assert relative_error(ours, tower.wanted(inputs, SIZES)) < 1e-5


@towers
def test_images_of_different_sizes_in_one_call_equal_single_calls(name: str) -> None:
    tower = TinyTower.of(name, seed=1)
    inputs = random_images(tower.metadata, SIZES)
    singles = [in_torch(tower.ours, inputs.part(image, image + 1)) for image in range(len(SIZES))]
    assert relative_error(in_torch(tower.ours, inputs), np.concatenate(singles)) < 1e-6


@towers
def test_the_graph_has_the_modules_numbers(name: str) -> None:
    tower = TinyTower.of(name, seed=2)
    inputs, graph = random_images(tower.metadata, SIZES), traced(tower.ours, tower.weights)
    assert {value.name for value in graph.graph.inputs} == {*tower.metadata.inputs, "image_start"}
    assert relative_error(in_onnxruntime(graph, inputs), in_torch(tower.ours, inputs)) < 1e-5


@pytest.mark.parametrize(("target", "limit"), [("ort-cpu", 1e-5), ("cpu:int8", 0.05), ("ort-cpu:int4", 0.05)])
def test_cpu_engines_cost_their_rounding(target: str, limit: float) -> None:
    tower = TinyTower.of("heads of 64", seed=3)
    graph, inputs = lowered(traced(tower.ours, tower.weights), target), random_images(tower.metadata, SIZES)
    assert relative_error(in_onnxruntime(graph, inputs), tower.wanted(inputs, SIZES)) < limit


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.05)])
def test_graphs_for_tensorrt_cost_their_rounding(dtype: str, limit: float) -> None:
    tower = TinyTower.of("as published", seed=4)
    inputs, graph = random_images(tower.metadata, SIZES), traced(tower.ours, tower.weights)
    assert relative_error(as_on_gpus(graph, dtype, inputs), in_torch(tower.ours, inputs)) < limit


def test_pruning_leaves_the_embedding_of_patches_as_it_is() -> None:
    tower = TinyTower.of("heads of 64")
    matrices = {name for name, weight in tower.weights.items() if len(weight.shape) == 2}
    found = {value.name for value in prunable(traced(tower.ours, tower.weights))}
    assert found == matrices - {"patch_embedding.weight"}


def test_tensorrt_rtx_builds_a_plan_of_it(tmp_path: Path) -> None:
    tower = TinyTower.of("heads of 64", seed=5)
    assert_builds_a_plan(traced(tower.ours, tower.weights), tower.metadata, tower.ours.config.depth, tmp_path)


@pytest.mark.parametrize(
    ("vision", "top", "error", "words"),
    [
        ({"head_dim": 8}, {}, UnsupportedModelError, r"head_dim = 8 \(supported: 16\)"),
        ({"num_attention_heads": 3, "head_dim": 10}, {}, FieldError, "vision heads"),
        ({"hidden_act": "relu"}, {}, UnsupportedModelError, 'hidden_act = "relu"'),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, UnsupportedModelError, 'rope_type = "yarn"'),
        ({"patch_size": [4, 8]}, {}, CheckpointError, "patch_size = "),
        ({}, {"vision_feature_layer": -2}, UnsupportedModelError, r"vision_feature_layer = -2 \(supported: -1, 2\)"),
        ({}, {"vision_feature_layer": [-1, -2]}, UnsupportedModelError, "vision_feature_layer = "),
        ({}, {"projector_hidden_act": "relu"}, UnsupportedModelError, 'projector_hidden_act = "relu"'),
    ],
    ids=["head_dim", "heads", "activation", "rope", "patches", "layer", "layers", "projector"],
)
def test_other_towers_are_refused_by_name(
    vision: dict[str, Any], top: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        pixtral_tower(Fields(VISION | vision), Fields(top), OUT, EPSILON)


def test_fields_have_the_references_defaults() -> None:
    config = pixtral_tower(Fields({}), Fields({}), OUT, 1e-6)
    assert (config.hidden, config.depth, config.heads, config.head_dim, config.rope_theta) == (1024, 24, 16, 64, 1e4)
    assert (config.mlp.width, config.mlp.activation, config.patch_size, config.merge_size) == (4096, "gelu", 16, 2)
    assert (config.projector_activation, config.projector_bias) == ("gelu", False)
