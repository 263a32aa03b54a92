"""The Pixtral tower with Mistral 3's projector: which config.json it is made of."""

from __future__ import annotations

from typing import Any

import pytest

from moevlm.export.families.fields import Fields
from moevlm.export.families.pixtral import pixtral_tower
from moevlm.runtime.core.errors import CheckpointError, FieldError, UnsupportedModelError
from tests.support.pixtral_tower import EPSILON, OUT, VISION


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
