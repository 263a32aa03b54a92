"""Candidates in numpy, by hand and against the definition of a softmax."""

import numpy as np

from moevlm.plugins.ops.candidates import candidates


def test_the_largest_come_first_and_of_equal_ones_the_lower_id():
    values, ids, log_sum_exp = candidates(np.array([[1, 3, 2, 3, -1]], np.float32), 3)
    assert values.tolist() == [[3, 3, 2]]
    assert ids.tolist() == [[1, 3, 2]]
    assert np.isclose(log_sum_exp[0], np.log(np.exp([1, 3, 2, 3, -1]).sum()))
    assert (values.dtype, ids.dtype, log_sum_exp.dtype) == (np.float32, np.int32, np.float32)


def test_values_less_log_sum_exp_are_the_logarithms_of_probabilities():
    logits = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32) * 20
    values, _, log_sum_exp = candidates(logits, 50)
    np.testing.assert_allclose(np.exp(values - log_sum_exp[:, None]).sum(axis=1), 1, rtol=1e-5)


def test_nan_and_infinity_are_seen():
    nan, inf = np.nan, np.inf
    rows = np.array([[0, nan, 1, nan], [0, inf, nan, 1], [0, 1, -inf, inf], [-inf] * 4, [0, -inf, 1, 2]], np.float32)
    values, ids, log_sum_exp = candidates(rows, 3)
    assert ids.tolist() == [[1, 3, 2], [2, 1, 3], [3, 1, 0], [0, 1, 2], [3, 2, 0]]
    np.testing.assert_array_equal(values[0], np.array([nan, nan, 1], np.float32))
    assert np.isnan(log_sum_exp).tolist() == [True, True, True, True, False]
