"""The likeliest tokens of whole rows, against a full sort."""

from __future__ import annotations

import numpy as np
import pytest

from moevlm.runtime.engine.candidates import candidates_of


@pytest.mark.parametrize("vocabulary", [1, 3, 255, 256, 257, 1000, 1023, 5000])
@pytest.mark.parametrize("levels", [0, 3, 300])  # so many different values; 0 for all different
def test_candidates_are_the_beginning_of_the_sorted_row(vocabulary: int, levels: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = rng.standard_normal((4, vocabulary)).astype(np.float32) * 5
    if levels:
        logits = rng.integers(0, levels, (4, vocabulary)).astype(np.float32) / 10
    logits[1, rng.integers(0, vocabulary, vocabulary // 2)] = -np.inf
    logits[:, 0] = 0
    found, order = candidates_of(logits, 256), np.argsort(-logits, axis=1, kind="stable")[:, :256]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_array_equal(found.values, np.take_along_axis(logits, order, 1))
    exact = np.log(np.exp(logits.astype(np.float64)).sum(1))
    np.testing.assert_allclose(found.log_sum_exp, exact, rtol=1e-6, atol=1e-6)
    assert (found.values.dtype, found.ids.dtype, found.log_sum_exp.dtype) == (np.float32, np.int32, np.float32)


def test_no_row_has_no_candidates() -> None:
    found = candidates_of(np.zeros((0, 300), np.float32), 256)
    assert (found.values.shape, found.ids.shape, found.log_sum_exp.shape) == ((0, 256), (0, 256), (0,))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_without_a_largest_finite_value_shows_it(value: float) -> None:
    logits = np.zeros((2, 300), np.float32)
    logits[1, 7] = value
    found = candidates_of(logits, 256)
    assert found.log_sum_exp[0] == pytest.approx(np.log(300))
    np.testing.assert_array_equal(found.values[1], np.full(256, value, np.float32))
    np.testing.assert_array_equal(found.log_sum_exp[1], np.float32(value))
