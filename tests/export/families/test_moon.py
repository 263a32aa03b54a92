"""MoonViT with the projector of Kimi-K2.5: its published form, and which config.json it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moevlm.export.families.fields import Fields
from moevlm.export.families.moon import moon_tower
from moevlm.export.graph.weights import read
from moevlm.runtime.core.errors import CheckpointError, FieldError, UnsupportedModelError
from tests.support.moon_tower import CONFIGURATIONS, OUT, VISION, TinyMoonTower

towers = pytest.mark.parametrize("name", CONFIGURATIONS)


@towers
def test_a_tower_as_published_is_the_same(name: str) -> None:
    saved, published = TinyMoonTower.of(name), TinyMoonTower.of(name, published=True)
    for parameter, weight in saved.weights.items():
        np.testing.assert_array_equal(read(weight), read(published.weights[parameter]), err_msg=parameter)


@pytest.mark.parametrize(
    ("vision", "top", "error", "words"),
    [
        ({"pos_emb_width": 6}, {}, CheckpointError, r"pos_emb_width = 6 \(allowed: pos_emb_height = 5\)"),
        (
            {"merge_kernel_size": [2, 3]},
            {},
            CheckpointError,
            r"merge_kernel_size = \[2, 3\] \(allowed: the same number twice",
        ),
        ({"num_attention_heads": 3}, {}, FieldError, "vision heads"),
        ({"hidden_act": "silu"}, {}, UnsupportedModelError, 'hidden_act = "silu"'),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, UnsupportedModelError, 'rope_type = "yarn"'),
        ({"merge_type": "sd2"}, {}, UnsupportedModelError, 'merge_type = "sd2"'),
        ({"vt_hidden_size": 64}, {}, CheckpointError, r"vt_hidden_size = 64 \(allowed: hidden_size = 32\)"),
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
