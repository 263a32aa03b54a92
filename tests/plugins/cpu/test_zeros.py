"""4-bit weights whose groups have zeros of their own, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from moevlm.export.formats import cpu_packing
from moevlm.plugins.ops.spec import ExpertsSpec

GROUPS = (16, 32, 48, 128)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def weight(rng: np.random.Generator, rows: int, columns: int, group: int, symmetric: bool = False):
    """q, scales, zeros and the values."""
    groups = -(-columns // group)
    q = rng.integers(0, 16, (rows, columns), np.uint8)
    scales = (rng.uniform(0.5, 2, (rows, groups)) / 32 / columns**0.5).astype(np.float16)
    zeros = np.full((rows, groups), 8, np.uint8) if symmetric else rng.integers(0, 17, (rows, groups), np.uint8)
    each = [np.repeat(part, group, axis=1)[:, :columns].astype(np.float32) for part in (scales, zeros)]
    return q, scales, zeros, (q.astype(np.float32) - each[1]) * each[0]


@pytest.mark.parametrize("columns", [200, 256])
@pytest.mark.parametrize("group", GROUPS)
def test_unpack_undoes_pack(rng, group, columns):
    q, scales, zeros, _ = weight(rng, 70, columns, group)
    packed = cpu_packing.pack(q, scales, 4, group, zeros)
    assert packed.nbytes == cpu_packing.packed_bytes(70, columns, 4, group, zeros=True)
    found = cpu_packing.unpack(packed, 70, columns, 4, group)
    for back, array in zip(
        (*found, cpu_packing.unpack_zeros(packed, 70, columns, 4, group)), (q, scales, zeros), strict=True
    ):
        np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("group", GROUPS)
def test_zeros_of_8_give_the_bits_of_weights_without(kernels, rng, group, tokens):
    q, scales, zeros, _ = weight(rng, 50, 200, group, symmetric=True)
    x = rng.standard_normal((tokens, 200)).astype(np.float32)
    with_zeros = kernels.linear(x, cpu_packing.pack(q, scales, 4, group, zeros), None, 50, 4, group, zeros=True)
    without = kernels.linear(x, cpu_packing.pack(q, scales, 4, group), None, 50, 4, group)
    assert with_zeros.tobytes() == without.tobytes()


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("group", GROUPS)
def test_linear_equals_numpy_on_the_same_rounded_activations(kernels, rng, group, tokens):
    q, scales, zeros, values = weight(rng, 50, 200, group)
    x = rng.standard_normal((tokens, 200)).astype(np.float32)
    y = kernels.linear(x, cpu_packing.pack(q, scales, 4, group, zeros), None, 50, 4, group, zeros=True)
    rows = kernels.quantize(x, 4, group)
    rounded = rows[..., :4].copy().view(np.float32).astype(np.float64) * rows[..., 8:].view(np.int8)
    expected = rounded.reshape(tokens, -1)[:, :200] @ values.astype(np.float64).T
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(values).sum(1).max())


@pytest.mark.parametrize("biased", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("gated", [True, False])
def test_experts_take_zeros_in_both_matrices(kernels, rng, gated, biased):
    hidden, width, experts, group = 72, 40, 4, 32
    rows = 2 * width if gated else width
    pack = cpu_packing.pack_gate_up if gated else cpu_packing.pack
    up, down = ([weight(rng, n, k, group) for _ in range(experts)] for n, k in ((rows, hidden), (hidden, width)))
    x, spec = rng.standard_normal((5, hidden)).astype(np.float32), ExpertsSpec(gated=gated)
    index, share = rng.integers(0, experts, (5, 2), dtype=np.int32), rng.uniform(0.1, 1, (5, 2)).astype(np.float32)
    biases = [rng.standard_normal((experts, n)).astype(np.float32) if biased else None for n in (rows, hidden)]

    def run(zeros: bool, banks) -> np.ndarray:
        packed = [
            np.stack([make(q, s, 4, group, z if zeros else None) for q, s, z, _ in bank])
            for make, bank in zip((pack, cpu_packing.pack), banks, strict=True)
        ]
        return kernels.experts(x, index, share, *packed, spec, width, 4, group, *biases, zeros=zeros)[0]

    symmetric = [[(q, s, np.full_like(z, 8), v) for q, s, z, v in bank] for bank in (up, down)]
    assert run(True, symmetric).tobytes() == run(False, symmetric).tobytes()
    assert np.abs(run(True, (up, down)) - run(False, (up, down))).max() > 0.01
