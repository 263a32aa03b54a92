"""Stored weights against ml_dtypes, the exporter's quantizer and the op's stated shapes."""

import ml_dtypes
import numpy as np
import pytest

from moevlm.export.formats import quantization
from moevlm.plugins.gpu import packing
from moevlm.plugins.gpu.ops import BLOCKS, ExpertsOp
from moevlm.plugins.ops.spec import ExpertsSpec

FORMATS = ("int8", "int4", "fp8")
# Half a step over the largest value of a block; fp8: half of its last place, over the value itself.
ERRORS = {"int8": 0.5 / 127, "int4": 0.5 / 7, "fp8": 1 / 16}


def rows_of(n: int, width: int) -> np.ndarray:
    return np.random.default_rng().standard_normal((n, width)).astype(np.float32)


def test_every_fp8_code_is_read_as_ml_dtypes_does() -> None:
    codes = np.setdiff1d(np.arange(256), [127, 255]).astype(np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    stored = np.pad(codes, (0, 2)).view(np.int8)[None]
    found = packing.unpack(stored, np.ones((1, 2), np.float32), "fp8", 128, 254)
    np.testing.assert_array_equal(found[0], expected)
    assert np.signbit(found[0, 127])


def test_fp8_is_rounded_as_ml_dtypes_does() -> None:
    grid = packing.FP8
    ties = (grid[1:] + grid[:-1]) / 2
    near = np.concatenate([grid, ties, np.nextafter(ties, 0), np.nextafter(ties, 448)])
    values = np.concatenate([near, -near, np.random.default_rng().uniform(-448, 448, 1000), [448.0]])
    values = np.pad(values.astype(np.float32), (0, -len(values) % 128), constant_values=448).reshape(-1, 128)
    values[:, 0] = 448  # so every block's scale is 1
    stored, scales = packing.quantize(values, "fp8", 128, "float32")
    np.testing.assert_array_equal(scales, 1)
    np.testing.assert_array_equal(stored.view(np.uint8), values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_to_a_dtype_is_numpy_s(dtype: str) -> None:
    values = rows_of(7, 300) * np.float32(10) ** rows_of(7, 300)
    np.testing.assert_array_equal(packing.rounded(values, dtype), values.astype(np.dtype(dtype)).astype(np.float32))


@pytest.mark.parametrize("width", [256, 200, 20])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("weights", FORMATS)
def test_what_is_stored_is_near_what_was_given(weights: str, block: int, dtype: str, width: int) -> None:
    rows = rows_of(6, width)
    rows[2] = 0
    stored, scales = packing.quantize(rows, weights, block, dtype)
    back = packing.unpack(stored, scales, weights, block, width)
    assert back.shape == rows.shape
    np.testing.assert_array_equal(packing.rounded(scales, dtype), scales)
    peak = np.repeat(np.abs(np.pad(rows, ((0, 0), (0, -width % block)))).reshape(6, -1, block).max(2), block, 1)
    # A scale that was rounded down cuts off the peak by as much.
    slack = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-6}[dtype]
    assert (np.abs(back - rows) <= peak[:, :width] * (ERRORS[weights] + slack)).all()


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_searched_codes_are_kept(weights: str, bits: int) -> None:
    scheme = quantization.Scheme(bits, 32)
    q, scales = quantization.quantize(rows_of(5, 96), scheme)
    back = packing.unpack(packing.pack_codes(q, weights), scales, weights, 32, 96)
    np.testing.assert_array_equal(back, quantization.dequantize(q, scales, scheme))


@pytest.mark.parametrize("weights", FORMATS)
def test_stored_shapes_are_those_of_the_op(weights: str) -> None:
    op = ExpertsOp(ExpertsSpec(), 3, 2, hidden=200, inner=40, weights=weights, block=128)
    shapes = {tensor.name: tensor.shape for tensor in op.inputs}
    for name, rows, width in (("gate_up", 80, 200), ("down", 200, 40)):
        stored, scales = packing.quantize(rows_of(3 * rows, width), weights, 128, op.dtype)
        assert (3, rows, stored.shape[1]) == shapes[name]
        assert (3, rows, scales.shape[1]) == shapes[f"{name}_scale"]
        leading = packing.unpack(stored.reshape(shapes[name]), scales.reshape(3, rows, -1), weights, 128, width)
        assert leading.shape == (3, rows, width)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_a_weight_without_a_scale_is_refused(value: float) -> None:
    rows = rows_of(2, 64)
    rows[1, 3] = value
    with pytest.raises(ValueError, match="allowed: finite in float16"):
        packing.quantize(rows, "int8", 32, "float16")
