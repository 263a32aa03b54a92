"""Gemma 4's tower: which config.json it is made of, and how its weights are rearranged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moevlm.export.families.fields import Fields
from moevlm.export.families.gemma4_vision import gemma4_tower, image_marks
from moevlm.export.graph.rearranged import Flat, Reordered
from moevlm.export.graph.weights import Constant, read
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from moevlm.runtime.core.manifest import ImageMarks
from tests.support.gemma4_tower import BASE, OUT


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"use_clipped_linears": True}, UnsupportedModelError, "use_clipped_linears = true"),
        ({"num_key_value_heads": 1}, CheckpointError, r"num_key_value_heads = 1 \(allowed: num_attention_heads = 2\)"),
        ({"pooling_kernel_size": 1}, CheckpointError, r"pooling_kernel_size = 1 \(allowed: 2 or more"),
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
