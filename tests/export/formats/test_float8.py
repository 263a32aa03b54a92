"""e4m3 codes against ml_dtypes."""

import ml_dtypes
import numpy as np

from moevlm.export.formats.float8 import VALUES, Float8Format


def test_every_code_is_read_as_ml_dtypes_does() -> None:
    codes = np.setdiff1d(np.arange(256), [127, 255]).astype(np.uint8)
    found = Float8Format(254).decode(codes[None, None], np.ones((1, 1), np.float32))[0]
    np.testing.assert_array_equal(found, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.signbit(found[127])


def test_numbers_are_rounded_as_ml_dtypes_does() -> None:
    ties = (VALUES[1:] + VALUES[:-1]) / 2
    near = np.concatenate([VALUES, ties, np.nextafter(ties, 0), np.nextafter(ties, 448)])
    values = np.concatenate([near, -near, np.random.default_rng().uniform(-448, 448, 1000), [448.0]])
    values = np.pad(values.astype(np.float32), (0, -len(values) % 128), constant_values=448).reshape(-1, 128)
    values[:, 0] = 448  # so every group's scale is 1
    codes, scales = Float8Format(128).encode(values)
    np.testing.assert_array_equal(scales, 1)
    np.testing.assert_array_equal(codes[:, 0], values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
