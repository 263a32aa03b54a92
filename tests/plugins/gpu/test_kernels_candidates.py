"""The candidates' kernels: interpreted, against the numpy spec, and compiled for every GPU."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moevlm.plugins.gpu.compiler import resources
from moevlm.plugins.gpu.devices import DEVICES
from moevlm.plugins.gpu.ops.candidates import GROUP, CandidatesOp
from moevlm.plugins.ops.candidates import candidates
from moevlm.runtime.core.errors import FieldError
from tests.plugins.gpu.interpreter import Interpreter

# Both infinities, both zeros, the least and the largest numbers, and some that are often equal.
ODD = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1, 1, 1, -1, 2], np.float32)


def agrees(interpreter: Interpreter, logits: np.ndarray, count: int = 256) -> None:
    op = CandidatesOp(logits.shape[1], count)
    values, ids, log_sum_exp = interpreter.run(op.draft(80), {"logits": logits})
    want = candidates(logits, op.columns)
    np.testing.assert_array_equal(ids, want[1])
    np.testing.assert_array_equal(values.view(np.int32), want[0].view(np.int32))
    np.testing.assert_allclose(log_sum_exp, want[2], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 10, 255, 256, 257, 256 * GROUP, 256 * GROUP + 1, 20001])
def test_any_vocabulary_agrees_with_the_spec(triton_interpreter: Interpreter, vocabulary: int) -> None:
    random = np.random.default_rng(vocabulary)
    agrees(triton_interpreter, random.standard_normal((2, vocabulary)).astype(np.float32) * 4)


def test_a_real_vocabulary_agrees_with_the_spec(triton_interpreter: Interpreter) -> None:
    agrees(triton_interpreter, np.random.default_rng(0).standard_normal((2, 151936)).astype(np.float32) * 4)


@pytest.mark.parametrize("row", ["equal", "lowest", "falling", "rising", "one group", "last"])
def test_rows_that_are_hard_to_choose_from(triton_interpreter: Interpreter, row: str) -> None:
    n = 300 * GROUP + 5
    rising = np.arange(n, dtype=np.float32)
    rows = {
        "equal": np.zeros(n, np.float32),
        "lowest": np.full(n, -np.inf, np.float32),
        "falling": rising[::-1].copy(),
        "rising": rising,
        "one group": np.where((rising >= 7 * GROUP) & (rising < 8 * GROUP), 1, 0).astype(np.float32),
        "last": np.where(rising == n - 1, -1, -np.inf).astype(np.float32),
    }
    agrees(triton_interpreter, rows[row][None])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ties_nan_and_infinities_anywhere(triton_interpreter: Interpreter, data: st.DataObject) -> None:
    count = data.draw(st.sampled_from((1, 3, 20)))
    vocabulary = data.draw(st.integers(1, 4 * count * GROUP))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    kinds = data.draw(st.lists(st.sampled_from(range(len(ODD))), min_size=1, max_size=5))
    logits = random.choice(ODD[kinds], (2, vocabulary))
    some = random.random(logits.shape) < data.draw(st.sampled_from((0, 0.01, 0.5)))
    agrees(triton_interpreter, np.where(some, random.standard_normal(logits.shape), logits).astype(np.float32), count)


def test_rows_are_read_once_for_all_that_is_needed_of_them() -> None:
    """Besides the logits: a maximum for each group, a pair for each program, and the places of what is chosen."""
    (variant,) = CandidatesOp(151936).draft(90).variants
    assert len(variant.steps) == 2
    assert variant.workspace({"T": 1}) < 151936 * 4 / 20


def test_kernels_fit_every_gpu_and_spill_nothing() -> None:
    found = resources(CandidatesOp(1 << 18), DEVICES)
    assert [(each.entry, each.sm) for each in found] == [
        (entry, sm) for sm in DEVICES for entry in ("group_logits", "choose_logits")
    ]
    assert not any(each.spilled for each in found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocabulary": (1 << 18) + 1}, r"vocabulary = 262145 \(allowed: 1 to 262144\)"),
        ({"vocabulary": 10, "count": 257}, r"count = 257 \(allowed: 1 to 256\)"),
    ],
    ids=["vocabulary", "count"],
)
def test_more_than_one_program_has_room_for_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        CandidatesOp(**fields)
