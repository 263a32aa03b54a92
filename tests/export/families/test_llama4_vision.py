"""Llama 4's tower: which config.json it is made of."""

from __future__ import annotations

from typing import Any

import pytest

from moevlm.export.families.fields import Fields
from moevlm.export.families.llama4_vision import llama4_tower
from moevlm.runtime.core.errors import CheckpointError, FieldError, UnsupportedModelError
from tests.support.llama4_tower import OUT, VISION


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"num_attention_heads": 3}, FieldError, "vision heads"),
        ({"num_attention_heads": 16}, FieldError, "vision heads = 16"),
        (
            {"image_size": 12},
            CheckpointError,
            "image_size = 12 \\(allowed: a multiple of 8, the side of a visual token",
        ),
        ({"pixel_shuffle_ratio": 0.3}, UnsupportedModelError, r"pixel_shuffle_ratio = 0.3 \(supported: 1.0, 0.5, 0.25"),
        ({"intermediate_size": 64}, CheckpointError, r"intermediate_size = 64 \(allowed: 128, that of the patches"),
        (
            {"projector_output_dim": 41},
            CheckpointError,
            r"projector_output_dim = 41 \(allowed: projector_input_dim = 40",
        ),
        ({"vision_output_dim": 41}, CheckpointError, r"vision_output_dim = 41 \(allowed: projector_input_dim = 40"),
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
