"""Integer formats of weights: exact properties of the integers, and the lazy tensors that hold them."""

import numpy as np
import pytest

from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.ort_packing import pack, packed
from moevlm.export.graph.weights import Constant, WeightTensor, read
from moevlm.runtime.core.errors import BuildError

SCHEMES = [IntFormat(bits, size) for bits in (4, 8) for size in (16, 32, 128)]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"int{s.bits}-{s.group_size}")


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng().standard_normal(shape).astype(np.float32)


def nearest(rows: np.ndarray, scheme: IntFormat) -> np.ndarray:
    """rows rounded to the grid whose longer end is the value of largest magnitude."""
    blocks, zero = rows.reshape(len(rows), -1, scheme.group_size), 1 << (scheme.bits - 1)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scale = peak / -zero
    return (np.clip(np.rint(blocks / scale), -zero, zero - 1) * scale).reshape(rows.shape)


@schemes
def test_shapes_and_dtypes(scheme):
    q, scales = scheme.encode(weights(5, 256))
    assert (q.shape, q.dtype) == ((5, 256 // scheme.group_size, scheme.group_size), np.uint8)
    assert (scales.shape, scales.dtype) == (q.shape[:2], np.float32)
    assert q.max() < 2**scheme.bits


@schemes
def test_no_group_is_worse_than_rounded_to_the_nearest_and_all_together_better(scheme):
    rows = weights(64, 256)
    found, plain, whole = (
        (part**2).reshape(64, -1, scheme.group_size).sum(-1)
        for part in (scheme.decode(*scheme.encode(rows)) - rows, nearest(rows, scheme) - rows, rows)
    )
    # The search compares what is left of |x|^2 in float32.
    assert (found <= plain + 1e-6 * whole).all()
    assert found.sum() < 0.97 * plain.sum()


@schemes
def test_error_is_that_of_the_bits(scheme):
    rows = weights(64, 256)
    error = scheme.decode(*scheme.encode(rows)) - rows
    # Rounding a normal block over 2**bits steps: some 10 % at 4 bits, a sixteenth of that at 8.
    assert np.sqrt((error**2).mean()) < {4: 0.13, 8: 0.009}[scheme.bits]


@schemes
def test_values_on_the_grid_are_kept(scheme):
    zero = 1 << (scheme.bits - 1)
    whole = np.random.default_rng().integers(-zero + 1, zero, (3, 4, scheme.group_size)).astype(np.float32)
    whole[..., 7] = -zero  # the end of the grid that there is only one of
    step = np.float32(2.0) ** np.random.default_rng().integers(-8, 8, (3, 4, 1))
    rows = (whole * step).reshape(3, -1)
    np.testing.assert_allclose(scheme.decode(*scheme.encode(rows)), rows, rtol=1e-6)


def test_rows_are_quantized_each_alone():
    rows, scheme = weights(2000, 96), IntFormat(4, 32)
    q, scales = scheme.encode(rows)
    for part in (slice(0, 7), slice(7, 1999), slice(1999, 2000)):
        again = scheme.encode(rows[part])
        np.testing.assert_array_equal(again[0], q[part])
        np.testing.assert_array_equal(again[1], scales[part])


def test_a_group_of_zeros_has_a_finite_scale():
    scheme = IntFormat(4, 32)
    q, scales = scheme.encode(np.zeros((2, 32), np.float32))
    assert np.isfinite(scales).all()
    assert (scheme.decode(q, scales) == 0).all()


def test_a_ragged_width_is_padded_with_zeros():
    rows, scheme = weights(3, 40), IntFormat(4, 32)
    back = scheme.decode(*scheme.encode(rows))
    assert back.shape == (3, 64)
    assert (back[:, 40:] == 0).all()


def test_even_values_lie_in_the_low_half_of_a_byte():
    q = np.arange(16, dtype=np.uint8).reshape(1, 1, 16)
    np.testing.assert_array_equal(pack(q, 4)[0, 0], [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    assert pack(q, 8) is q


@pytest.mark.parametrize(("width", "size"), [(2048, 128), (768, 128), (192, 64), (96, 32), (48, 16)])
def test_groups_shrink_until_they_divide_the_width(width, size):
    assert IntFormat(4, 128).fit(width) == IntFormat(4, size)


def test_no_group_fits_a_width_that_sixteen_does_not_divide():
    assert IntFormat(4, 128).fit(24) is None


class Counted(Constant):
    """A weight that counts how many of its rows were read."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array)
        object.__setattr__(self, "count", 0)

    def rows(self, start: int, stop: int) -> np.ndarray:
        object.__setattr__(self, "count", self.count + stop - start)
        return super().rows(start, stop)


@pytest.mark.parametrize("flat", [False, True])
def test_lazy_parts_hold_what_encode_returns(flat):
    experts, scheme = weights(4, 6, 64), IntFormat(4, 32)
    source = Counted(experts)
    parts = packed(source, scheme, flat)
    q, scales = scheme.encode(experts.reshape(-1, 64))
    np.testing.assert_array_equal(read(parts.values).reshape(-1), pack(q, scheme.bits).reshape(-1))
    np.testing.assert_array_equal(read(parts.others[0]).reshape(-1), scales.reshape(-1))
    assert parts.values.shape == ((4, 6, 32) if flat else (4, 6, 2, 16))
    assert source.count == 4  # the scales were kept while the values were read


def test_scales_asked_for_first_are_right_too():
    rows, scheme = weights(8, 64), IntFormat(8, 32)
    np.testing.assert_array_equal(read(packed(Constant(rows), scheme).others[0]), scheme.encode(rows)[1])


@pytest.mark.parametrize("rows", [3, 4000], ids=["inline", "streamed"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_weight_that_is_not_finite_is_refused_under_its_initializer_s_name(rows, value):
    array = weights(rows, 64)
    array[rows - 1, 40] = value
    tensor = WeightTensor("some.weight.int8", packed(Constant(array), IntFormat(8, 32)).values)
    for consume in (tensor.tobytes, lambda: list(tensor.pieces())):
        with pytest.raises(BuildError, match=r"^initializer some\.weight\.int8: values that are infinite or not"):
            consume()
