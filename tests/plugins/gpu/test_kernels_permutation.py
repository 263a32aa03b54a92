"""Rows sorted by expert in one launch, interpreted, against numpy."""

from typing import Any

import numpy as np
import pytest

from tests.plugins.gpu.interpreter import Interpreter

MOST, STEP = 64, 16


def sort(index: np.ndarray, experts: int, block_rows: int) -> list[np.ndarray]:
    """starts, rows and blocks, in the process of the interpreter; what is not written is -1."""
    import torch

    from moevlm.plugins.gpu import kernels

    shapes = ((2, experts + 1), (index.size,), (index.size, 2))
    made: list[Any] = [torch.full(shape, -1, dtype=torch.int32) for shape in shapes]
    constants = {"EXPERTS": experts, "TOP_K": index.shape[1], "MOST": MOST, "STEP": STEP, "OVERLAPS": False}
    grid = (-(-index.size // STEP),)
    kernels.sort_rows[grid](torch.from_numpy(index), *made, len(index), block_rows, **constants)
    return [array.numpy() for array in made]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (5, 3, 4), (16, 4, 7), (21, 3, 40)])
@pytest.mark.parametrize("block_rows", [1, 4, 16])
def test_rows_stand_by_expert_in_blocks(
    triton_interpreter: Interpreter, tokens: int, top_k: int, experts: int, block_rows: int
) -> None:
    index = np.random.default_rng(tokens).integers(-2, experts + 2, (tokens, top_k)).astype(np.int32)
    starts, rows, blocks = triton_interpreter.call(sort, index, experts, block_rows)
    expert = index.ravel().clip(-1, experts - 1)
    there = np.flatnonzero(expert >= 0)
    counts = np.bincount(expert[there], minlength=experts)
    np.testing.assert_array_equal(rows[: len(there)], there[np.argsort(expert[there], kind="stable")])
    assert (rows[len(there) :] == -1).all()
    np.testing.assert_array_equal(starts[0], np.cumsum([0, *counts]))
    np.testing.assert_array_equal(starts[1], np.cumsum([0, *-(-counts // block_rows)]))
    expected = [(e, starts[0, e] + first) for e, count in enumerate(counts) for first in range(0, count, block_rows)]
    np.testing.assert_array_equal(blocks[: len(expected)], expected)
    assert (blocks[len(expected) :] == -1).all()
