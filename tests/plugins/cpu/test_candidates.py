"""The likeliest tokens of rows of logits, against a stable sort of the whole row."""

from __future__ import annotations

import ctypes

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from moevlm.plugins.cpu import limits
from moevlm.plugins.ops.candidates import candidates
from moevlm.runtime.backends.libraries import operators_path
from tests.support.cpu_kernels import INSTRUCTION_SETS, Kernels


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def kernels(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Kernels:
    kernels = Kernels(library, request.param, threads=2)
    if not kernels.available():
        pytest.skip(f"this processor has no {request.param}")
    return kernels


def check(kernels: Kernels, logits: np.ndarray, count: int) -> None:
    got, want = kernels.candidates(logits, count), candidates(logits, count)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0], want[0])
    # A rounding of the result, and two millionths of the mass.
    np.testing.assert_allclose(got[2], want[2], rtol=6e-8, atol=1e-6)


KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 4,
    "ties": lambda rng, shape: np.round(rng.standard_normal(shape)),
    "signed zeros": lambda rng, shape: np.copysign(0.0, rng.standard_normal(shape)),
    "constant": lambda rng, shape: rng.integers(1, size=shape) - 7.25,
    "falling": lambda rng, shape: -np.sort(rng.standard_normal(shape), axis=1),
    "rising": lambda rng, shape: np.sort(rng.standard_normal(shape), axis=1) * 30,
    "far apart": lambda rng, shape: rng.standard_normal(shape) * 1e30,
    "masked": lambda rng, shape: np.where(rng.random(shape) < 0.9, -np.inf, rng.standard_normal(shape)),
}


@given(
    st.integers(0, 2**32),
    st.sampled_from(list(KINDS)),
    st.integers(0, 3),
    st.one_of(st.integers(1, 40), st.integers(41, 9000)),
    st.integers(1, 300),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_candidates_are_the_first_of_the_sorted_row(kernels, seed, kind, rows, vocabulary, count):
    logits = KINDS[kind](np.random.default_rng(seed), (rows, vocabulary)).astype(np.float32)
    check(kernels, logits, min(count, vocabulary))


@pytest.mark.parametrize("kind", ["normal", "falling", "ties"])
def test_candidates_of_a_large_vocabulary(kernels, kind):
    check(kernels, KINDS[kind](np.random.default_rng(0), (2, 152_064)).astype(np.float32), 256)


@pytest.mark.parametrize("vocabulary", [5, 700, 6007])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf], ids=["nan", "-nan", "inf"])
def test_a_row_that_is_not_usable_shows_it(kernels, value, vocabulary):
    logits = np.random.default_rng(0).standard_normal((4, vocabulary)).astype(np.float32)
    logits[1, vocabulary - 2] = logits[2, 1] = value
    values, ids, log_sum_exp = kernels.candidates(logits, 5)
    assert np.isfinite(log_sum_exp).tolist() == [True, False, False, True]
    assert [row[0] for row in ids[1:3]] == [vocabulary - 2, 1]
    assert not np.isfinite(values[1:3, 0]).any()
    assert np.isfinite(values[1:3, 1:]).all()
    check(kernels, logits, 5)


def test_rows_of_nothing_but_one_value_that_is_not_usable(kernels):
    for value in (np.nan, np.inf, -np.inf):
        logits = np.full((1, 9000), value, np.float32)
        values, ids, log_sum_exp = kernels.candidates(logits, 256)
        np.testing.assert_array_equal(values, np.full((1, 256), value, np.float32))
        np.testing.assert_array_equal(ids, [np.arange(256)])
        assert np.isnan(log_sum_exp)


def test_a_row_s_bits_do_not_depend_on_other_rows_or_threads(kernels):
    logits = np.random.default_rng(0).standard_normal((5, 5000)).astype(np.float32)
    together = Kernels(kernels.library, kernels.name, 3).candidates(logits, 100)
    for i in range(len(logits)):
        alone = Kernels(kernels.library, kernels.name, 1).candidates(logits[i : i + 1], 100)
        for part, whole in zip(alone, together, strict=True):
            assert part[0].tobytes() == whole[i].tobytes()


def run(logits: np.ndarray, **attributes: int) -> list[np.ndarray]:
    names = {"values": TensorProto.FLOAT, "ids": TensorProto.INT32, "log_sum_exp": TensorProto.FLOAT}
    node = helper.make_node("Candidates", ["logits"], list(names), domain="moevlm.cpu", **attributes)
    inputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None] * logits.ndim)]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in names.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("moevlm.cpu", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(operators_path()))
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers).run(None, {"logits": logits})


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_candidates_in_a_session(rows):
    logits = np.random.default_rng(0).standard_normal((rows, 1000)).astype(np.float32)
    for got, want in zip(run(logits, count=64), candidates(logits, 64), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "attributes", "message"),
    [
        ((1, 8), {"count": 9}, r"logits has shape \[1, 8\] \(allowed: \[L, V\], V from count = 9 to 16777216\)"),
        ((8,), {"count": 1}, r"logits has shape \[8\] \(allowed: \[L, V\]"),
        ((1, 8), {"count": 0}, rf"count = 0 \(allowed: 1 to {limits.CANDIDATES}\)"),
        ((1, 8), {}, "attribute count is missing"),
    ],
)
def test_what_does_not_fit_is_refused(shape, attributes, message):
    with pytest.raises(Exception, match=f"Candidates: {message}"):
        run(np.zeros(shape, np.float32), **attributes)
