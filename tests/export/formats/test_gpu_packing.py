"""Packed weights as numbers again, and their shapes against those that the op states."""

import ml_dtypes
import numpy as np
import pytest

from moevlm.export.formats.float4 import Float4Format
from moevlm.export.formats.gpu_packing import pack, pack_scale_words, pack_scales, pack_zeros, unpack
from moevlm.export.formats.registry import FORMATS, weight_format
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.ops.spec import ExpertsSpec
from moevlm.runtime.core.dtypes import E4M3


def rows_of(n: int, width: int) -> np.ndarray:
    return np.random.default_rng().standard_normal((n, width)).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_unpacking_gives_what_the_codes_stand_for(name: str) -> None:
    form = weight_format(name, 32)
    codes, scales = form.encode(rows_of(5, 96))
    np.testing.assert_array_equal(unpack(pack(codes, name), pack_scales(scales), form, 96), form.decode(codes, scales))


def test_int4_units_hold_values_a_quarter_of_the_group_apart() -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(1, 1, 16)
    units = pack(codes, "int4").view("<u2")[0]
    np.testing.assert_array_equal(units, [0xC840, 0xD951, 0xEA62, 0xFB73])


def test_scales_stand_by_group_and_every_group_starts_at_16_bytes() -> None:
    scales = np.arange(10, dtype=np.float32).reshape(5, 2)  # two groups of five rows
    np.testing.assert_array_equal(pack_scales(scales), [[0, 2, 4, 6, 8, 0, 0, 0], [1, 3, 5, 7, 9, 0, 0, 0]])


def test_zeros_stand_by_group_eight_rows_to_a_word() -> None:
    zeros = np.arange(20, dtype=np.uint8).reshape(10, 2) % 16
    np.testing.assert_array_equal(pack_zeros(zeros).view(np.uint32), [[0xECA86420, 0x20], [0xFDB97531, 0x31]])
    codes, scales = np.full((10, 2, 32), 7, np.uint8), np.ones((10, 2), np.float32)
    found = unpack(pack(codes, "int4"), pack_scales(scales), weight_format("int4", 32), 64, pack_zeros(zeros))
    np.testing.assert_array_equal(found, np.repeat(7 - zeros.astype(np.float32), 32, 1))


def test_a_unit_of_nvfp4_has_a_value_of_each_of_four_groups_whose_scales_are_a_word() -> None:
    codes = np.arange(2 * 5 * 16, dtype=np.uint8).reshape(2, 5, 16) % 16 ^ np.arange(5, dtype=np.uint8)[:, None]
    units = pack(codes, "fp4").view("<u2")
    assert units.shape == (2, 32)  # of five groups, and three that fill up
    np.testing.assert_array_equal(units[:, 0], [0x3210, 0x3210])
    np.testing.assert_array_equal(units[0, 18], codes[0, 4, 2])
    scales = np.arange(56, 66, dtype=np.uint8).reshape(2, 5)  # 56 is 1, each step an eighth
    words = pack_scale_words(scales[None])
    np.testing.assert_array_equal(words, [[[0x3B3A3938, 0x403F3E3D, *[0] * 6], [0x3C, 0x41, *[0] * 6]]])
    row_scales = np.array([[2, 3]], np.float32)
    found = unpack(pack(codes, "fp4")[None], words, Float4Format(16, E4M3), 72, row_scales=row_scales)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = np.concatenate([numbers, -numbers])
    scale = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * row_scales[0, :, None]
    np.testing.assert_array_equal(found[0], (numbers[codes] * scale[..., None]).reshape(2, 80)[:, :72])


@pytest.mark.parametrize("name", FORMATS)
def test_packed_shapes_are_those_of_the_op(name: str) -> None:
    op = ExpertsOp(ExpertsSpec(), 3, 2, hidden=200, inner=40, weights=name, group_size=128)
    form = weight_format(name, 128, op.dtype)
    shapes = {tensor.name: tensor.shape for tensor in op.inputs}
    for weight, rows, width in (("gate_up", 80, 200), ("down", 200, 40)):
        codes, scales = form.encode(rows_of(3 * rows, width))
        stored, by_group = pack(codes, name), pack_scales(scales.reshape(3, rows, -1))
        assert (3, rows, stored.shape[1]) == shapes[weight]
        assert by_group.shape == shapes[f"{weight}_scale"]
        leading = unpack(stored.reshape(shapes[weight]), by_group, form, width)
        assert leading.shape == (3, rows, width)
