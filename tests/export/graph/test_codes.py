"""Codes and what they stand for, through the rearrangements of weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from moevlm.export.graph.codes import Coded, CodeForm, Codes, decode
from moevlm.export.graph.moved_codes import coded
from moevlm.export.graph.rearranged import Picked, Reordered, RowBlocks, swap_last
from moevlm.export.graph.weights import Concat, Constant, Stack, Weight, cast, read

E2M1 = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@dataclass(frozen=True)
class Held(Coded):
    """Codes and scales in memory: [N, K] or [E, N, K]."""

    form: CodeForm
    values: np.ndarray
    scales: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def codes(self, start: int, stop: int) -> Codes:
        size = self.form.group_size
        filled = np.pad(self.values, [(0, 0)] * (self.values.ndim - 1) + [(0, -self.values.shape[-1] % size)])
        return Codes(filled.reshape(*filled.shape[:-1], -1, size)[start:stop], self.scales[start:stop])


def held(*shape: int, form: CodeForm, seed: int = 0) -> Held:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16 if form.bits == 4 else 120, shape, np.uint8)
    *outer, n, k = shape
    blocks = rng.uniform(0.5, 2, (*outer, -(-n // form.block_rows), -(-k // form.group_size))).astype(np.float32)
    return Held(form, codes, blocks.repeat(form.block_rows, -2)[..., :n, :])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fp8", torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()),
        ("fp8_e5m2", torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).float().numpy()),
        ("fp4", np.tile(np.array(E2M1, np.float32), 16)),
        ("int4", np.arange(256, dtype=np.float32) - 8),
        ("int8", np.arange(256, dtype=np.float32) - 128),
    ],
)
def test_numbers_of_codes(kind: str, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(CodeForm(kind, 32).numbers, expected)


@pytest.mark.parametrize("width", [5, 6, 32, 33])
def test_codes_are_decoded_group_by_group(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moevlm.export.graph.codes._CHUNK", 12)
    rng, form = np.random.default_rng(1), CodeForm("int8", 3, zeros=True)
    codes = rng.integers(0, 256, (4, 11, 3), np.uint8)
    scales, zeros = rng.standard_normal((4, 11), np.float32), rng.integers(0, 256, (4, 11), np.uint8)
    expected = np.empty((4, 33), np.float32)
    for n, k in np.ndindex(4, 33):
        number = np.float32(codes[n, k // 3, k % 3]) - np.float32(zeros[n, k // 3])
        expected[n, k] = number * scales[n, k // 3]
    np.testing.assert_array_equal(decode(Codes(codes, scales, zeros), form, width), expected[:, :width])


BLOCKS, ROWS, ALL = CodeForm("fp8", 8, 4), CodeForm("int4", 8), CodeForm("fp8", 20, 12)
RECIPES: dict[str, tuple[Weight, CodeForm]] = {
    "joined-whole-blocks": (Concat([held(12, 20, form=BLOCKS), held(7, 20, form=BLOCKS)]), BLOCKS),
    "joined-cut-blocks": (Concat([held(7, 20, form=BLOCKS), held(12, 20, form=BLOCKS)]), CodeForm("fp8", 8)),
    "joined-tensors": (Concat([held(12, 20, form=ALL, seed=seed) for seed in (1, 2)]), ALL),
    "stacked": (Stack([held(7, 20, form=BLOCKS, seed=seed) for seed in range(5)]), BLOCKS),
    "turned": (swap_last(held(5, 10, 20, form=BLOCKS)), CodeForm("fp8", 4, 8)),
    "turned-tensors": (swap_last(held(5, 12, 20, form=ALL)), CodeForm("fp8", 12, 20)),
    "turned-back": (swap_last(swap_last(held(5, 10, 20, form=ROWS))), ROWS),
    "rows-of-blocks": (Picked(held(5, 12, 20, form=BLOCKS), range(4, 12)), BLOCKS),
    "rows-across-blocks": (Picked(held(5, 12, 20, form=BLOCKS), range(2, 12)), CodeForm("fp8", 8)),
    "rows-in-turn": (Picked(held(5, 12, 20, form=ROWS), [0, 6, 1, 7]), ROWS),
    "rows-of-heads": (RowBlocks(held(24, 20, form=BLOCKS), 4, 8, 4), BLOCKS),
    "heads-turned": (Reordered(held(24, 20, form=BLOCKS), [0, 2, 1, 3]), BLOCKS),
    "halves-of-a-block-turned": (Reordered(held(24, 20, form=BLOCKS), [1, 0]), BLOCKS),
    "heads-of-blocks-turned": (Reordered(held(24, 20, form=BLOCKS), [0, 2, 4, 6, 1, 3, 5, 7]), CodeForm("fp8", 8)),
    "rows-turned": (Reordered(held(24, 20, form=ROWS), [0, 2, 4, 1, 3, 5]), ROWS),
    "rows-of-small-heads": (RowBlocks(held(24, 20, form=BLOCKS), 2, 4, 2), CodeForm("fp8", 8)),
    "cast-to-what-it-is": (cast(held(7, 20, form=ROWS), np.dtype(np.float32)), ROWS),
}


@pytest.mark.parametrize("name", RECIPES)
def test_codes_go_where_their_weights_go(name: str) -> None:
    weight, form = RECIPES[name]
    found = coded(weight)
    assert found is not None
    assert (found.form, found.shape) == (form, weight.shape)
    np.testing.assert_array_equal(read(found), read(weight))
    codes = found.codes(1, 3)
    np.testing.assert_array_equal(decode(codes, form, weight.shape[-1]), weight.rows(1, 3))
    if weight.shape[0] != weight.shape[-2]:  # experts: scales are the same over whole blocks of rows
        for first in range(0, weight.shape[1], form.block_rows):
            block = codes.scales[:, first : first + form.block_rows]
            assert (block == block[:, :1]).all()


@pytest.mark.parametrize(
    "weight",
    [
        Constant(np.zeros((3, 4), np.float32)),
        Concat([held(4, 8, form=ROWS), Constant(np.zeros((3, 8), np.float32))]),
        Concat([held(4, 8, form=ROWS), held(4, 8, form=CodeForm("int4", 4))]),
        Stack([held(4, 8, form=ROWS), held(4, 8, form=CodeForm("int8", 8))]),
        swap_last(held(2, 4, 8, form=ROWS)),
        cast(held(4, 8, form=ROWS), np.dtype(np.float16)),
    ],
    ids=["floats", "floats-among-codes", "groups-of-two-sizes", "kinds", "turned-rows", "another-dtype"],
)
def test_what_has_no_common_codes_has_none(weight: Weight) -> None:
    assert coded(weight) is None
