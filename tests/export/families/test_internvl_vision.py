"""InternVL's tower: its costs, its launches, and which config.json it is made of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.plan_launches import launches
from moevlm.export.families.fields import Fields
from moevlm.export.families.internvl_vision import internvl_tower
from moevlm.export.graph.cost import patch_macs
from moevlm.runtime.core.errors import CheckpointError, EngineError, FieldError, UnsupportedModelError
from moevlm.runtime.request.vision_inputs import pack
from tests.support.internvl_tower import OUT, VISION, TinyInternVLTower
from tests.support.vision_towers import (
    assert_builds_a_plan,
    traced,
)


def test_costs_count_blocks_by_the_patch_and_the_projector_by_the_token() -> None:
    tower = TinyInternVLTower.of("heads of 64")
    graph, hidden, merged = traced(tower.ours, tower.weights), 128, 4 * 128
    per_patch = 2 * (4 * hidden * hidden + 2 * hidden * 64) + hidden * tower.metadata.patch_width
    assert patch_macs(graph, tower.metadata) == per_patch + merged * OUT // 4 + OUT * OUT // 4


def test_a_block_is_seven_launches_of_its_plan(tmp_path: Path) -> None:
    """Its two norms, its four products with what follows them, and attention; nothing is copied for class tokens."""
    tower = TinyInternVLTower.of("heads of 64", seed=5)
    assert_builds_a_plan(traced(tower.ours, tower.weights), tower.metadata, tower.ours.config.depth, tmp_path)
    (found,) = launches((tmp_path / "vision.plan").read_bytes())
    attention = [i for i, launch in enumerate(found) if launch.plugin == "SegmentAttention"]
    assert [stop - start for start, stop in pairwise(attention)] == [7]
    assert not [launch for launch in found if launch.kind == "copy"]


def test_an_image_of_another_size_is_refused() -> None:
    vision = TinyInternVLTower.of("as the small ones").metadata
    with pytest.raises(EngineError, match=r"^an image has 4 x 8 patches \(the model takes 4 x 4\)$"):
        pack(np.zeros((32, vision.patch_width), np.float32), [(4, 8)], vision)


@pytest.mark.parametrize(
    ("vision", "top", "error", "words"),
    [
        ({"num_attention_heads": 3}, {}, FieldError, "vision heads"),
        ({"hidden_act": "relu"}, {}, UnsupportedModelError, 'hidden_act = "relu"'),
        ({"norm_type": "group"}, {}, UnsupportedModelError, 'norm_type = "group"'),
        ({"image_size": [16, 32]}, {}, CheckpointError, r"image_size = \[16, 32\] \(allowed: a number from 1 to"),
        ({"image_size": 18}, {}, CheckpointError, r"image_size = 18 \(allowed: a multiple of 8, the side of a vis"),
        ({"use_absolute_position_embeddings": False}, {}, UnsupportedModelError, "use_absolute_position_embeddings"),
        ({}, {"downsample_ratio": 0.3}, UnsupportedModelError, r"downsample_ratio = 0.3 \(supported: 1.0, 0.5, 0.25"),
        ({}, {"vision_feature_layer": -2}, UnsupportedModelError, r"vision_feature_layer = -2 \(supported: -1, 2\)"),
        ({}, {"vision_feature_select_strategy": "full"}, UnsupportedModelError, 'select_strategy = "full"'),
        ({}, {"projector_hidden_act": "relu"}, UnsupportedModelError, 'projector_hidden_act = "relu"'),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_other_towers_are_refused_by_name(
    vision: dict[str, Any], top: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        internvl_tower(Fields(VISION | vision), Fields(top), OUT)


PUBLISHED: dict[str, Any] = {
    "architectures": ["InternVisionModel"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 1024,
    "image_size": [448, 448],
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-6,
    "layer_scale_init_value": 0.1,
    "model_type": "internvl_vision",
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": [14, 14],
    "drop_path_rate": 0.1,
    "projection_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": True,
    "use_qk_norm": False,
}
LARGE: dict[str, Any] = {
    **{"attention_bias": False, "hidden_size": 3200, "intermediate_size": 12800, "norm_type": "rms_norm"},
    **{"num_attention_heads": 25, "num_hidden_layers": 45, "use_qk_norm": True},
}


@pytest.mark.parametrize("fields", [{}, LARGE], ids=["300M", "6B"])
def test_every_published_field_is_read(fields: dict[str, Any]) -> None:
    vision, top = Fields(PUBLISHED | fields), Fields({"downsample_ratio": 0.5, "vision_feature_layer": -1})
    config = internvl_tower(vision, top, OUT)
    vision.refuse_unread()
    top.refuse_unread()
    assert (config.side, config.qk_norm, config.norm) == (32, bool(fields), "rms" if fields else "layer")


def test_fields_have_the_references_defaults() -> None:
    config = internvl_tower(Fields({}), Fields({}), OUT)
    assert (config.hidden, config.depth, config.heads, config.head_dim, config.mlp.width) == (1024, 24, 16, 64, 4096)
    assert (config.side, config.patch_size, config.merge_size, config.epsilon) == (32, 14, 2, 1e-6)
    assert (config.norm, config.qkv_bias, config.qk_norm, config.last_norm) == ("layer", False, False, False)
