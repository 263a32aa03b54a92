"""Llama 4's tower and projector against transformers, and the engines' graphs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.families.fields import Fields
from moevlm.export.families.llama4_vision import llama4_tower
from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.prune_2_4 import prunable
from moevlm.runtime.core.errors import CheckpointError, FieldError, UnsupportedModelError
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.llama4_tower import CONFIGURATIONS, OUT, VISION, TinyTower
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
IMAGES = 3


def images(tower: TinyTower) -> VisionInputs:
    tokens = tower.metadata.side // tower.metadata.merge_size
    return random_images(tower.metadata, [(tokens, tokens)] * IMAGES)


@towers
def test_images_in_one_call_are_those_of_transformers(name: str) -> None:
    tower = TinyTower.of(name)
    inputs = images(tower)
    ours = in_torch(tower.ours, inputs)
    assert ours.shape == (IMAGES * (tower.metadata.side // tower.metadata.merge_size) ** 2, OUT)
    assert relative_error(ours, tower.wanted(inputs)) < 1e-5


@towers
def test_the_graph_has_the_modules_numbers(name: str) -> None:
    tower = TinyTower.of(name, seed=2)
    inputs, graph = images(tower), traced(tower.ours, tower.weights)
    assert {value.name for value in graph.graph.inputs} == {*tower.metadata.inputs, "image_start"}
    wanted = in_torch(tower.ours, inputs)
    assert relative_error(in_onnxruntime(graph, inputs), wanted) < 1e-5
    tokens = len(wanted) // IMAGES
    assert relative_error(in_onnxruntime(graph, inputs.part(1, 2)), wanted[tokens : 2 * tokens]) < 1e-5


@pytest.mark.parametrize(("target", "limit"), [("ort-cpu", 1e-5), ("cpu:int8", 0.05), ("ort-cpu:int4", 0.05)])
def test_cpu_engines_cost_their_rounding(target: str, limit: float) -> None:
    tower = TinyTower.of("heads of 44 as published", seed=3)
    graph, inputs = lowered(traced(tower.ours, tower.weights), target), images(tower)
    assert relative_error(in_onnxruntime(graph, inputs), tower.wanted(inputs)) < limit


def test_an_image_has_the_same_bits_alone_on_a_cpu() -> None:
    tower = TinyTower.of("heads of 44 as published", seed=3)
    graph, inputs = lowered(traced(tower.ours, tower.weights), "cpu:int8"), images(tower)
    singles = [in_onnxruntime(graph, inputs.part(image, image + 1)) for image in range(IMAGES)]
    np.testing.assert_array_equal(in_onnxruntime(graph, inputs), np.concatenate(singles))


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.05)])
def test_graphs_for_tensorrt_cost_their_rounding(dtype: str, limit: float) -> None:
    tower = TinyTower.of("as published", seed=4)
    inputs, graph = images(tower), traced(tower.ours, tower.weights)
    assert relative_error(as_on_gpus(graph, dtype, inputs), in_torch(tower.ours, inputs)) < limit


def test_pruning_leaves_the_embedding_of_patches_as_it_is() -> None:
    tower = TinyTower.of("heads of 44 as published")
    found = {value.name for value in prunable(traced(tower.ours, tower.weights))}
    matrices = {name for name, parameter in tower.ours.named_parameters() if parameter.dim() == 2}
    assert found == matrices - {"patch_embedding.weight", "position_embedding"}


def test_tensorrt_rtx_builds_a_plan_of_it(tmp_path: Path) -> None:
    tower = TinyTower.of("heads of 44 as published", seed=5)
    assert_builds_a_plan(traced(tower.ours, tower.weights), tower.metadata, tower.ours.config.depth, tmp_path)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"num_attention_heads": 3}, FieldError, "vision heads"),
        ({"num_attention_heads": 16}, FieldError, "vision heads = 16"),
        ({"image_size": 12}, CheckpointError, "image_size = 12 \\(a multiple of 8, the side of a visual token"),
        ({"pixel_shuffle_ratio": 0.3}, UnsupportedModelError, r"pixel_shuffle_ratio = 0.3 \(supported: 1.0, 0.5, 0.25"),
        ({"intermediate_size": 64}, CheckpointError, r"intermediate_size = 64 \(128, that of the patches"),
        ({"projector_output_dim": 41}, CheckpointError, r"projector_output_dim = 41 \(projector_input_dim = 40"),
        ({"vision_output_dim": 41}, CheckpointError, r"vision_output_dim = 41 \(projector_input_dim = 40"),
        ({"rope_parameters": {"rope_type": "yarn"}}, UnsupportedModelError, 'rope_type = "yarn"'),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_other_towers_are_refused_by_name(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        llama4_tower(Fields(VISION | fields), OUT)


def test_fields_have_the_references_defaults() -> None:
    widths = {"hidden_size": 1408, "vision_output_dim": 4096}
    config = llama4_tower(Fields(widths), OUT)
    assert (config.depth, config.heads, config.head_dim, config.mlp.width) == (34, 16, 88, 5632)
    assert (config.side, config.patch_size, config.merge_size, config.rope_theta) == (32, 14, 2, 1e4)
    assert config.projector.widths == (4096, 4096)
