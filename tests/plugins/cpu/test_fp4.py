"""Weights of e2m1 numbers, 4 bits each, on every instruction set: the bits of the same weights in 8-bit integers."""

from __future__ import annotations

import numpy as np
import pytest

from bench import variants
from moevlm.export.formats import cpu_packing

GROUPS = (16, 32, 48, 128)
# OCP Microscaling Formats 1.0, table 5
NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def weight(rng: np.random.Generator, rows: int, columns: int, group: int):
    """codes, scales and the values."""
    codes = rng.integers(0, 16, (rows, columns), np.uint8)
    scales = (rng.uniform(0.5, 2, (rows, -(-columns // group))) / 8 / columns**0.5).astype(np.float16)
    return codes, scales, NUMBERS[codes] * np.repeat(scales, group, axis=1)[:, :columns].astype(np.float32)


def in_integers(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same weights as 8-bit integers; the scales are large enough for halves to be exact."""
    return (128 + 2 * NUMBERS[codes]).astype(np.uint8), scales / 2


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("group", GROUPS)
def test_linear_has_the_bits_of_8_bit_integers(kernels, rng, group, tokens):
    codes, scales, values = weight(rng, 50, 200, group)
    x, bias = rng.standard_normal((tokens, 200)).astype(np.float32), rng.standard_normal(50).astype(np.float32)
    found = kernels.linear(x, cpu_packing.pack(codes, scales, 4, group), bias, 50, 4, group, fp4=True)
    wanted = kernels.linear(x, cpu_packing.pack(*in_integers(codes, scales), 8, group), bias, 50, 8, group)
    assert found.tobytes() == wanted.tobytes()
    np.testing.assert_allclose(found, x @ values.T + bias, rtol=0, atol=0.02 * np.abs(values).sum(1).max())


@pytest.mark.parametrize("group", GROUPS)
def test_the_largest_sums_do_not_overflow(kernels, group):
    """Every product at its largest, of either sign."""
    codes = np.repeat(np.array([[7], [15]], np.uint8), 256, axis=1)
    scales, x = np.ones((2, -(-256 // group)), np.float16), np.ones((1, 256), np.float32)
    found = kernels.linear(x, cpu_packing.pack(codes, scales, 4, group), None, 2, 4, group, fp4=True)
    np.testing.assert_allclose(found, [[6 * 256, -6 * 256]], rtol=1e-6)
    found = kernels.linear(-x, cpu_packing.pack(codes, scales, 4, group), None, 2, 4, group, fp4=True)
    np.testing.assert_allclose(found, [[-6 * 256, 6 * 256]], rtol=1e-6)


@pytest.mark.parametrize("biased", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("name", variants.BLOCKS)
def test_experts_have_the_bits_of_8_bit_integers(kernels, rng, name, biased):
    hidden, width, experts, group, spec = 72, 40, 4, 32, variants.BLOCKS[name]
    rows = 2 * width if spec.gated else width
    up, down = ([weight(rng, n, k, group) for _ in range(experts)] for n, k in ((rows, hidden), (hidden, width)))
    x = rng.standard_normal((9, hidden)).astype(np.float32)
    index, share = rng.integers(0, experts, (9, 2), dtype=np.int32), rng.uniform(0.1, 1, (9, 2)).astype(np.float32)
    biases = [rng.standard_normal((experts, n)).astype(np.float32) if biased else None for n in (rows, hidden)]

    def run(fp4: bool) -> np.ndarray:
        makers = (cpu_packing.pack_gate_up if spec.gated else cpu_packing.pack), cpu_packing.pack
        bits = 4 if fp4 else 8
        packed = [
            np.stack([make(*((q, s) if fp4 else in_integers(q, s)), bits, group) for q, s, _ in bank])
            for make, bank in zip(makers, (up, down), strict=True)
        ]
        return kernels.experts(x, index, share, *packed, spec, width, bits, group, *biases, fp4=fp4)[0]

    assert run(fp4=True).tobytes() == run(fp4=False).tobytes()
