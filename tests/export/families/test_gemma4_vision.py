"""Gemma 4's tower and projector against transformers, and the engines' graphs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.families.fields import Fields
from moevlm.export.families.gemma4_vision import gemma4_tower, image_marks
from moevlm.export.graph.rearranged import Flat, Reordered
from moevlm.export.graph.weights import Constant, read
from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.prune_2_4 import prunable
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from moevlm.runtime.core.manifest import ImageMarks
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.gemma4_tower import BASE, CONFIGURATIONS, OUT, SIZES, TinyTower
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


def made(name: str = "standardized", seed: int = 0) -> TinyTower:
    return TinyTower.of(seed, **CONFIGURATIONS[name])


def images(tower: TinyTower) -> VisionInputs:
    return random_images(tower.metadata, SIZES)


def in_transformers(tower: TinyTower, inputs: VisionInputs) -> np.ndarray:
    """All images in one padded batch."""
    sizes, table = np.diff(inputs.image_start), tower.metadata.position_table
    patches = np.zeros((len(sizes), sizes.max(), tower.metadata.patch_width), np.float32)
    places = np.full((len(sizes), sizes.max(), 2), -1, np.int64)
    for image, size in enumerate(sizes):
        part = inputs.part(image, image + 1)
        patches[image, :size], places[image, :size] = (
            (part.pixel_patches + 1) / 2,
            part.rows["position_index"] - [0, table],
        )
    return tower.wanted(patches, places)


@towers
def test_images_of_different_sizes_in_one_call_are_those_of_transformers(name: str) -> None:
    tower = made(name)
    inputs = images(tower)
    ours = in_torch(tower.ours, inputs)
    assert ours.shape == (sum(h * w for h, w in SIZES), OUT)
    assert relative_error(ours, in_transformers(tower, inputs)) < 1e-5


@towers
def test_images_of_different_sizes_in_one_call_equal_single_calls(name: str) -> None:
    tower = made(name, seed=1)
    inputs = images(tower)
    singles = [in_torch(tower.ours, inputs.part(image, image + 1)) for image in range(len(SIZES))]
    assert relative_error(in_torch(tower.ours, inputs), np.concatenate(singles)) < 1e-6


@towers
def test_the_graph_has_the_modules_numbers(name: str) -> None:
    tower = made(name, seed=2)
    inputs, graph = images(tower), traced(tower.ours, tower.weights)
    assert {value.name for value in graph.graph.inputs} == {*tower.metadata.inputs, "image_start"}
    assert relative_error(in_onnxruntime(graph, inputs), in_torch(tower.ours, inputs)) < 1e-5


@pytest.mark.parametrize(("target", "limit"), [("ort-cpu", 1e-5), ("cpu:int8", 0.03), ("ort-cpu:int4", 0.03)])
def test_cpu_engines_cost_their_rounding(target: str, limit: float) -> None:
    tower = made("heads of 72 as published", seed=3)
    graph = lowered(traced(tower.ours, tower.weights), target)
    inputs = images(tower)
    assert relative_error(in_onnxruntime(graph, inputs), in_transformers(tower, inputs)) < limit


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.05)])
def test_graphs_for_tensorrt_cost_their_rounding(dtype: str, limit: float) -> None:
    tower = made(seed=4)
    inputs, graph = images(tower), traced(tower.ours, tower.weights)
    assert relative_error(as_on_gpus(graph, dtype, inputs), in_torch(tower.ours, inputs)) < limit


def test_pruning_leaves_the_embedding_of_patches_as_it_is() -> None:
    tower = made("heads of 72 as published")
    blocks = {name for name in tower.weights if name.startswith("blocks") and len(tower.weights[name].shape) == 2}
    assert {value.name for value in prunable(traced(tower.ours, tower.weights))} == blocks | {"projection.weight"}


def test_tensorrt_rtx_builds_a_plan_of_it(tmp_path: Path) -> None:
    tower = made("heads of 72 as published", seed=5)
    graph = traced(tower.ours, tower.weights)
    assert_builds_a_plan(graph, tower.metadata, tower.ours.config.depth, tmp_path)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"use_clipped_linears": True}, UnsupportedModelError, "use_clipped_linears = true"),
        ({"num_key_value_heads": 1}, CheckpointError, r"num_key_value_heads = 1 \(num_attention_heads = 2\)"),
        ({"pooling_kernel_size": 1}, CheckpointError, r"pooling_kernel_size = 1 \(2 or more"),
        ({"hidden_activation": "silu"}, UnsupportedModelError, 'hidden_activation = "silu"'),
        ({"rope_parameters": {"rope_type": "yarn"}}, UnsupportedModelError, 'rope_type = "yarn"'),
    ],
    ids=["clipped", "kv heads", "no pooling", "activation", "rope"],
)
def test_other_towers_are_refused_by_name(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gemma4_tower(Fields(BASE | fields), OUT)


def test_fields_have_the_references_defaults() -> None:
    config = gemma4_tower(Fields({}), OUT)
    assert (config.hidden, config.depth, config.heads, config.head_dim, config.rope_theta) == (768, 16, 12, 64, 100.0)
    assert (config.merge_size, config.patch_size, config.position_table, config.standardize) == (3, 16, 10240, False)
    assert image_marks(Fields({})) == ImageMarks(begin=(255_999,), end=(258_882,))


@pytest.mark.parametrize("piece", [1, 3, 5, 24])
def test_rearranged_weights_are_the_same_in_pieces(piece: int) -> None:
    array = np.arange(4 * 6 * 3, dtype=np.float32).reshape(4, 6, 3)
    flat, order = Flat(Constant(array)), [2, 0, 1, 5, 4, 3]
    np.testing.assert_array_equal(read(flat), array.reshape(24, 3))
    turned = Reordered(flat, order)
    for weight, whole in ((flat, array.reshape(24, 3)), (turned, array[:, order].reshape(24, 3))):
        pieces = [weight.rows(start, min(start + piece, 24)) for start in range(0, 24, piece)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
        assert (weight.shape, weight.dtype) == ((24, 3), np.float32)
