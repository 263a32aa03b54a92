"""MoonViT with the projector of Kimi-K2.5 against transformers, and the engines' graphs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.families.fields import Fields
from moevlm.export.families.moon import moon_tower
from moevlm.export.graph.weights import read
from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.prune_2_4 import prunable
from moevlm.runtime.core.errors import CheckpointError, FieldError, UnsupportedModelError
from tests.support.moon_tower import CONFIGURATIONS, OUT, SIZES, VISION, TinyTower
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
def test_a_tower_as_published_is_the_same(name: str) -> None:
    saved, published = TinyTower.of(name), TinyTower.of(name, published=True)
    for parameter, weight in saved.weights.items():
        np.testing.assert_array_equal(read(weight), read(published.weights[parameter]), err_msg=parameter)


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
    tower = TinyTower.of("heads of 72, larger table", seed=3)
    graph, inputs = lowered(traced(tower.ours, tower.weights), target), random_images(tower.metadata, SIZES)
    assert relative_error(in_onnxruntime(graph, inputs), tower.wanted(inputs, SIZES)) < limit


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.05)])
def test_graphs_for_tensorrt_cost_their_rounding(dtype: str, limit: float) -> None:
    tower = TinyTower.of("as published", seed=4)
    inputs, graph = random_images(tower.metadata, SIZES), traced(tower.ours, tower.weights)
    assert relative_error(as_on_gpus(graph, dtype, inputs), in_torch(tower.ours, inputs)) < limit


def test_pruning_leaves_the_embedding_of_patches_as_it_is() -> None:
    tower = TinyTower.of("heads of 72, larger table")
    matrices = {name for name, weight in tower.weights.items() if len(weight.shape) == 2}
    found = {value.name for value in prunable(traced(tower.ours, tower.weights))}
    assert found == matrices - {"patch_embedding.weight", "position_embedding"}


def test_tensorrt_rtx_builds_a_plan_of_it(tmp_path: Path) -> None:
    tower = TinyTower.of("heads of 72, larger table", seed=5)
    assert_builds_a_plan(traced(tower.ours, tower.weights), tower.metadata, tower.ours.config.depth, tmp_path)


@pytest.mark.parametrize(
    ("vision", "top", "error", "words"),
    [
        ({"pos_emb_width": 6}, {}, CheckpointError, r"pos_emb_width = 6 \(pos_emb_height = 5\)"),
        ({"merge_kernel_size": [2, 3]}, {}, CheckpointError, r"merge_kernel_size = \[2, 3\] \(the same number twice"),
        ({"num_attention_heads": 3}, {}, FieldError, "vision heads"),
        ({"hidden_act": "silu"}, {}, UnsupportedModelError, 'hidden_act = "silu"'),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, UnsupportedModelError, 'rope_type = "yarn"'),
        ({"merge_type": "sd2"}, {}, UnsupportedModelError, 'merge_type = "sd2"'),
        ({"vt_hidden_size": 64}, {}, CheckpointError, r"vt_hidden_size = 64 \(hidden_size = 32\)"),
        ({}, {"projection_hidden_size": 1152}, UnsupportedModelError, "projection_hidden_size = 1152"),
    ],
    ids=["table", "merge", "heads", "activation", "rope", "merger", "two widths", "projector"],
)
def test_other_towers_are_refused_by_name(
    vision: dict[str, Any], top: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        moon_tower(Fields(VISION | vision), Fields(top), OUT)


def test_fields_as_published_are_those_of_transformers() -> None:
    """moonshotai/Kimi-K2.5, config.json: vision_config; transformers has these sizes as defaults."""
    published = {
        "init_pos_emb_height": 64,
        "init_pos_emb_time": 4,
        "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2],
        "merge_type": "sd2_tpool",
        "mm_hidden_size": 1152,
        "mm_projector_type": "patchmerger",
        "patch_size": 14,
        "pos_emb_type": "divided_fixed",
        "projector_hidden_act": "gelu",
        "projector_ln_eps": 1e-5,
        "text_hidden_size": 7168,
        "video_attn_type": "spatial_temporal",
        "vt_hidden_size": 1152,
        "vt_intermediate_size": 4304,
        "vt_num_attention_heads": 16,
        "vt_num_hidden_layers": 27,
    }
    fields = Fields(published)
    config = moon_tower(fields, Fields({}), 7168)
    fields.refuse_unread()
    assert config == moon_tower(Fields({}), Fields({}), 7168)
    assert (config.hidden, config.depth, config.heads, config.head_dim) == (1152, 27, 16, 72)
