"""A row's bits depend on nothing but the row: not on the rows beside it, their number or order, nor on the threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import variants
from moevlm.export.formats import cpu_packing
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from tests.support.cpu_kernels import Kernels

sizes = st.one_of(st.integers(1, 40), st.integers(120, 300))
tokens = st.one_of(st.integers(2, 20), st.integers(45, 130))
blocks = st.sampled_from([16, 32, 48, 128, 256])
# `kernels` is the same for all examples.
examples = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Rows = tuple[np.ndarray, ...]


def assert_independent(
    kernels: Kernels, rng: np.random.Generator, call: Callable[..., Rows | np.ndarray], *rows: np.ndarray
) -> None:
    """call(kernels, *rows): its results, row by row, for any rows of `rows` are those of all of them."""

    def bits(threads: int, chosen: np.ndarray) -> list[bytes]:
        results = call(
            Kernels(kernels.library, kernels.name, threads), *(np.ascontiguousarray(r[chosen]) for r in rows)
        )
        arrays = results if isinstance(results, tuple) else (results,)
        return [b"".join(array[i].tobytes() for array in arrays) for i in range(len(chosen))]

    count = len(rows[0])
    everything = bits(2, np.arange(count))
    picks = [np.array([i]) for i in rng.choice(count, min(count, 6), replace=False)]
    picks += [np.sort(rng.choice(count, rng.integers(1, count), replace=False)), rng.permutation(count)]
    picks.append(rng.integers(0, count, rng.integers(1, 2 * count)))  # some of them more than once
    for threads, chosen in zip(rng.integers(1, 5, len(picks)), picks, strict=True):
        assert bits(int(threads), chosen) == [everything[i] for i in chosen]


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Values of many magnitudes, whose sums tell every order from every other."""
    return rng.standard_normal(shape, np.float32) * np.float32(10.0) ** rng.integers(-3, 4, shape).astype(np.float32)


def packed(rng: np.random.Generator, experts: int, rows: int, columns: int, bits: int, block: int) -> np.ndarray:
    """Random weights [experts, bytes], their scales near 1."""
    weight = rng.integers(0, 256, (experts, cpu_packing.packed_bytes(rows, columns, bits, block)), np.uint8)
    parts = weight.reshape(-1, cpu_packing.PANEL * (2 + block * bits // 8))
    parts[:, : 2 * cpu_packing.PANEL] = (
        rng.uniform(0.5, 2, (len(parts), cpu_packing.PANEL)).astype(np.float16).view("u1")
    )
    return weight


@given(st.integers(0, 2**32), tokens, sizes, sizes, st.sampled_from([4, 8]), blocks, st.booleans())
@examples
def test_linear(kernels, seed, count, n, k, bits, block, has_bias):
    rng = np.random.default_rng(seed)
    weight, bias = packed(rng, 1, n, k, bits, block), floats(rng, n) if has_bias else None
    assert_independent(kernels, rng, lambda ks, x: ks.linear(x, weight, bias, n, bits, block), floats(rng, count, k))


@given(st.integers(0, 2**32), tokens, sizes, st.one_of(sizes, st.integers(500, 700)), st.booleans())
@examples
def test_float_linear(kernels, seed, count, n, k, has_bias):
    rng = np.random.default_rng(seed)
    weight, bias = cpu_packing.pack_floats(floats(rng, n, k)), floats(rng, n) if has_bias else None
    assert_independent(kernels, rng, lambda ks, x: ks.float_linear(x, weight, bias, n), floats(rng, count, k))


@given(st.integers(0, 2**32), tokens, st.integers(1, 20), sizes, sizes, st.sampled_from([4, 8]), blocks)
@examples
def test_linear_of_heads(kernels, seed, count, heads, n, k, bits, block):
    rng = np.random.default_rng(seed)
    weight, x = packed(rng, heads, n, k, bits, block), floats(rng, count, heads * k)
    assert_independent(kernels, rng, lambda ks, x: ks.linear(x, weight, None, n, bits, block, heads=heads), x)


@given(
    st.integers(0, 2**32),
    tokens,
    st.sampled_from(list(variants.BLOCKS.values())),
    st.tuples(st.integers(1, 9), st.integers(1, 4), sizes, sizes),
    st.sampled_from([4, 8]),
    blocks,
    st.booleans(),
)
@examples
def test_experts_whatever_the_neighbours_choose(kernels, seed, count, spec, shape, bits, block, has_biases):
    rng = np.random.default_rng(seed)
    experts, top_k, hidden, width = shape
    rows = width * (2 if spec.gated else 1)
    arguments = {
        "gate_up": packed(rng, experts, -(-width // 16) * 32 if spec.gated else width, hidden, bits, block),
        "down": packed(rng, experts, hidden, width, bits, block),
        "gate_up_bias": floats(rng, experts, rows) if has_biases else None,
        "down_bias": floats(rng, experts, hidden) if has_biases else None,
        "spec": replace(spec, limit=30.0),
        "width": width,
        "bits": bits,
        "block": block,
    }
    # Some experts are everybody's, some nobody's.
    index = np.minimum(rng.geometric(0.4, (count, top_k)) - 1, experts - 1).astype(np.int32)
    weight = rng.uniform(0.1, 1, (count, top_k)).astype(np.float32)
    assert_independent(
        kernels,
        rng,
        lambda ks, x, index, weight: ks.experts(x, index, weight, **arguments)[0],
        floats(rng, count, hidden),
        index,
        weight,
    )


@given(st.integers(0, 2**32), tokens, st.sampled_from(list(variants.ROUTERS.values())), st.integers(2, 40))
@examples
def test_router(kernels, seed, count, spec, size):
    rng = np.random.default_rng(seed)
    experts, bias = spec.n_group * size, None
    spec = replace(spec, top_k=min(spec.top_k, spec.topk_group * size))
    assert_independent(
        kernels, rng, lambda ks, logits: ks.route(logits, spec, bias), rng.standard_normal((count, experts), np.float32)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_of_one_token_are_those_among_hundreds(library: ctypes.CDLL, bits: int) -> None:
    """More rows of an expert than a task keeps, and more experts than the tasks of a single token divide."""
    rng = np.random.default_rng(bits)
    kernels = Kernels(library, "", 2)
    gate_up, down = packed(rng, 32, 512, 96, bits, 32), packed(rng, 32, 96, 256, bits, 32)
    index = rng.integers(0, 32, (700, 4), np.int32)
    index[:, 0] = 7
    weight = rng.uniform(0.1, 1, index.shape).astype(np.float32)
    arguments = {"spec": ExpertsSpec(), "width": 256, "bits": bits, "block": 32}
    assert_independent(
        kernels,
        rng,
        lambda ks, x, index, weight: ks.experts(x, index, weight, gate_up, down, **arguments)[0],
        floats(rng, 700, 96),
        index,
        weight,
    )


def test_router_of_many_tokens(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((600, 128), np.float32)
    assert_independent(Kernels(library, "", 2), rng, lambda ks, x: ks.route(x, RouterSpec(8)), logits)
