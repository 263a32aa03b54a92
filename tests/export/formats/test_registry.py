"""What holds for every weight format."""

import ml_dtypes  # noqa: F401 - numpy knows bfloat16 by it
import numpy as np
import pytest

from moevlm.export.formats.base import rounded
from moevlm.export.formats.registry import FORMATS, GROUP_SIZES, weight_format

# Half a step over the largest value of a group, of fp4 the last; fp8: half of its last place, over the value itself.
ERRORS = {"fp8": 1 / 16, "fp4": 1 / 6}
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-6}  # of a scale


def rows_of(n: int, width: int) -> np.ndarray:
    return np.random.default_rng().standard_normal((n, width)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_to_a_dtype_is_numpy_s(dtype: str) -> None:
    values = rows_of(7, 300) * np.float32(10) ** rows_of(7, 300)
    np.testing.assert_array_equal(rounded(values, dtype), values.astype(np.dtype(dtype)).astype(np.float32))


@pytest.mark.parametrize("width", [256, 200, 20])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_decoded_is_near_what_was_encoded(name: str, group_size: int, dtype: str, width: int) -> None:
    rows = rows_of(6, width)
    rows[2] = 0
    form = weight_format(name, group_size, dtype)
    assert (form.name, form.group_size, form.scales) == (name, group_size, dtype)
    codes, scales = form.encode(rows)
    groups = -(-width // group_size)
    assert (codes.shape, codes.dtype) == ((6, groups, group_size), np.uint8)
    assert int(codes.max()) < 1 << form.bits
    assert (scales.shape, scales.dtype) == ((6, groups), np.float32)
    np.testing.assert_array_equal(rounded(scales, dtype), scales)
    back = form.decode(codes, scales)
    assert (back.shape, back.dtype) == ((6, groups * group_size), np.float32)
    padded = np.pad(rows, ((0, 0), (0, -width % group_size)))
    values = padded.reshape(6, groups, group_size)
    peak, error = np.abs(values).max(2, keepdims=True), np.abs(back.reshape(values.shape) - values)
    if name in ERRORS:  # a scale that was rounded down cuts off the peak by as much
        assert (error <= peak * (ERRORS[name] + ROUNDING[dtype])).all()
    else:  # the search may clip a peak, but as a whole a group is no farther than where its peak is the largest integer
        step = peak / ((1 << (form.bits - 1)) - 1)
        plain = np.rint(np.divide(values, step, out=np.zeros_like(values), where=step > 0)) * step - values
        error, plain, whole = (np.linalg.norm(x, axis=2) for x in (error, plain, values))
        # The search compares what is left of |x|^2 in float32.
        assert (error**2 <= (plain + ROUNDING[dtype] * whole) ** 2 + 1e-6 * whole**2).all()


@pytest.mark.parametrize("name", FORMATS)
def test_leading_axes_are_decoded_as_rows(name: str) -> None:
    form = weight_format(name, 32)
    codes, scales = form.encode(rows_of(6, 64))
    whole = form.decode(codes, scales)
    np.testing.assert_array_equal(
        form.decode(codes.reshape(2, 3, 2, 32), scales.reshape(2, 3, 2)).reshape(6, 64), whole
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_a_weight_without_a_scale_is_refused(name: str, value: float) -> None:
    rows = rows_of(2, 64)
    rows[1, 3] = value
    with pytest.raises(ValueError, match=r"allowed: finite in float16|infinite or not a number cannot be quantized"):
        weight_format(name, 32, "float16").encode(rows)
