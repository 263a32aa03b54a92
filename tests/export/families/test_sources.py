"""Where canonical weights come from."""

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moevlm.export.families.gemma4_vision import GEMMA4_TOWER
from moevlm.export.families.sources import halves, halves_of_heads, plus_one, reordered
from moevlm.export.graph.weights import Constant, ScaledRows, Sum, read
from moevlm.plugins.ops.attention import rotate
from moevlm.runtime.core.errors import CheckpointError


def test_one_is_added_in_float32_and_not_in_the_dtype_that_is_stored() -> None:
    offset = np.array([2.0**-12, -0.5, 0.0], ml_dtypes.bfloat16)  # 1 + 2**-12 is no bfloat16
    gain = plus_one("layers.{i}.norm")({"layers.3.norm": Constant(offset)}, {"i": "3"}, (3,), "auto")
    assert gain.dtype == np.float32
    np.testing.assert_array_equal(read(gain), np.array([1 + 2.0**-12, 0.5, 1.0], np.float32))


@pytest.mark.parametrize("piece", [1, 3, 8])
def test_weights_made_of_two_are_the_same_in_pieces(piece: int) -> None:
    rng = np.random.default_rng(3)
    matrix, other, factor = (rng.standard_normal(shape).astype(np.float16) for shape in ((8, 5), (8, 5), 8))
    wide = [array.astype(np.float32) for array in (matrix, other, factor)]
    for weight, wanted in (
        (Sum(Constant(matrix), Constant(other)), wide[0] + wide[1]),
        (ScaledRows(Constant(matrix), Constant(factor)), wide[0] * wide[2][:, None]),
        (ScaledRows(Constant(factor), Constant(factor)), wide[2] ** 2),  # a bias
    ):
        pieces = [weight.rows(start, min(start + piece, 8)) for start in range(0, 8, piece)]
        np.testing.assert_array_equal(np.concatenate(pieces), wanted)
        assert (weight.shape, weight.dtype) == (wanted.shape, np.float32)


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        (halves(6), [0, 2, 4, 1, 3, 5]),
        (halves(4, start=2), [0, 1, 2, 4, 3, 5]),
        (halves(4, start=1, size=7), [0, 1, 3, 2, 4, 5, 6]),
    ],
    ids=["whole heads", "behind others", "between others"],
)
def test_pairs_of_neighbours_become_halves(order: tuple[int, ...], wanted: list[int]) -> None:
    assert list(order) == wanted


def test_heads_turned_as_halves_are_those_turned_in_pairs() -> None:
    rng, heads, dim = np.random.default_rng(0), 3, 8
    weight, bias = rng.standard_normal((heads * dim, 5)), rng.standard_normal(heads * dim)
    tensors = {"q.0.weight": Constant(weight), "q.0.bias": Constant(bias)}
    ours = [
        read(reordered(f"q.{{i}}.{part}", halves(dim))(tensors, {"i": "0"}, tensors[f"q.0.{part}"].shape, "auto"))
        for part in ("weight", "bias")
    ]
    x, angle = rng.standard_normal((4, 5)), rng.uniform(0, 6, (4, dim // 2))
    turned = rotate((x @ ours[0].T + ours[1]).reshape(4, heads, dim), np.cos(angle), np.sin(angle))
    pairs = (x @ weight.T + bias).reshape(4, heads, dim // 2, 2).view(np.complex128)[..., 0] * np.exp(1j * angle)[
        :, None
    ]
    np.testing.assert_allclose(turned, np.concatenate([pairs.real, pairs.imag], axis=-1), atol=1e-12)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2)], ids=str)
def test_heads_whose_norm_is_of_a_size_that_does_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    tensors = {"q": Constant(np.ones((16, 4), np.float32)), "q_norm": Constant(np.ones(shape, np.float32))}
    told = re.escape(f"tensor q_norm has shape {list(shape)}, the config asks for heads of 8 rows")
    with pytest.raises(CheckpointError, match=f"^{told}$"):
        halves_of_heads("q", "q_norm", 0)(tensors, {}, (8, 4), "auto")


@pytest.mark.parametrize("dim", [5, 6])  # axes share a head, and each turns in pairs
def test_heads_of_gemma4s_tower_that_do_not_turn_on_two_axes_are_refused(dim: int) -> None:
    block = "model.vision_tower.encoder.layers.0.self_attn."
    tensors = {f"{block}{name}_proj.linear.weight": Constant(np.ones((30, 4), np.float32)) for name in "qkv"}
    tensors[f"{block}q_norm.weight"] = Constant(np.ones(dim, np.float32))
    qkv: Any = GEMMA4_TOWER["vision.blocks.{i}.attention.qkv.weight"]
    with pytest.raises(
        CheckpointError, match=rf"q_norm.weight has shape \[{dim}\], the config asks for heads of 30 rows"
    ):
        qkv(tensors, {"i": "0"}, (90, 4), "auto")
