"""The quantized CPU kernels against float64 sums over the same quantized weights and activations."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from bench import variants
from moevlm.export.formats import cpu_packing
from moevlm.plugins.cpu import limits as cpu_limits
from moevlm.plugins.ops.experts import activate, linear
from moevlm.plugins.ops.head_linear import head_linear
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from tests.support.cpu_kernels import Kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels with")

PACKINGS = [(bits, block) for bits in (4, 8) for block in (16, 32, 128)]
# Integer sums are exact; what is left is float32 rounding of a sum over blocks, relative to the sum of magnitudes.
ROUNDING = 1e-6
HIDDEN, WIDTH = 96, 40


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def random_weight(rng, rows, columns, bits, block):
    q = rng.integers(0, 1 << bits, (rows, columns), np.uint8)
    scales = rng.uniform(0.5, 2.0, (rows, -(-columns // block))).astype(np.float16) / columns
    return q, scales


def dequantize_weight(q, scales, bits, block):
    values = q.astype(np.float64) - (1 << (bits - 1))
    return values * np.repeat(scales.astype(np.float64), block, axis=1)[:, : q.shape[1]]


def quantize_rows(x, block):
    """Scales and values of activations, as plugins/cpu/matmul/packing.h states them."""
    rows, columns = x.shape
    blocks = np.pad(x.astype(np.float32), ((0, 0), (0, -columns % block))).reshape(rows, -(-columns // block), block)
    most = np.abs(blocks).max(axis=2, keepdims=True, initial=0)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    return most / np.float32(127), np.rint(blocks * inverse)


def dequantize_rows(x, block):
    scale, q = quantize_rows(x, block)
    return (scale.astype(np.float64) * q).reshape(len(x), q.shape[1] * block)[:, : x.shape[1]]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


# Packing.


@pytest.mark.parametrize(("bits", "block"), PACKINGS)
@pytest.mark.parametrize(("rows", "columns"), [(32, 128), (70, 200)])
def test_unpack_undoes_pack(rng, bits, block, rows, columns):
    q, scales = random_weight(rng, rows, columns, bits, block)
    packed = cpu_packing.pack(q, scales, bits, block)
    assert packed.nbytes == cpu_packing.packed_bytes(rows, columns, bits, block)
    back_q, back_scales = cpu_packing.unpack(packed, rows, columns, bits, block)
    np.testing.assert_array_equal(back_q, q)
    np.testing.assert_array_equal(back_scales, scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_first_bytes_of_a_panel_are_where_the_layout_says(bits):
    q = (np.arange(32 * 32).reshape(32, 32) % (1 << bits)).astype(np.uint8)
    packed = cpu_packing.pack(q, np.arange(32, dtype=np.float32)[:, None], bits, 32)[0]
    assert packed[:64].view(np.float16).tolist() == list(range(32))
    high = q[5, 4:8] << 4 if bits == 4 else 0
    assert packed[64 + 5 * 4 : 64 + 5 * 4 + 4].tolist() == (q[5, :4] | high).tolist()


def test_panels_packed_on_their_own_are_the_panels_of_the_whole(rng):
    q, scales = random_weight(rng, 96, 64, 4, 32)
    parts = [cpu_packing.pack(q[i : i + 32], scales[i : i + 32], 4, 32) for i in (0, 32, 64)]
    np.testing.assert_array_equal(np.concatenate(parts), cpu_packing.pack(q, scales, 4, 32))


@pytest.mark.parametrize(
    ("bits", "block", "columns", "message"),
    [
        (3, 32, 2, r"bits = 3 \(allowed: 4, 8\)"),
        (4, 40, 2, r"group_size = 40 \(allowed: a multiple of 16 up to 256\)"),
        (4, 32, 3, r"scales has shape \[32, 3\] \(allowed: \[32, 2\]\)"),
    ],
)
def test_what_cannot_be_packed_is_refused(bits, block, columns, message):
    with pytest.raises(ValueError, match=message):
        cpu_packing.pack(np.zeros((32, 64), np.uint8), np.zeros((32, columns), np.float32), bits, block)


# Activations.


@pytest.mark.parametrize("block", [16, 32, 128])
def test_quantized_rows_are_those_of_numpy_to_the_bit(kernels, rng, block):
    x = normal(rng, 5, 200) * np.float32(10.0) ** rng.integers(-4, 5, (5, 1)).astype(np.float32)
    x[1] = 0
    rows = kernels.quantize(x, 4, block)
    scale, q = quantize_rows(x, block)
    np.testing.assert_array_equal(rows[:, :, :4].copy().view(np.float32), scale)
    np.testing.assert_array_equal(rows[:, :, 8:].view(np.int8), q)
    np.testing.assert_array_equal(rows[:, :, 4:8].copy().view(np.int32)[:, :, 0], -8 * q.sum(axis=2))


# Linear.


@pytest.mark.parametrize(("bits", "block"), PACKINGS)
@pytest.mark.parametrize(("n", "k"), [(32, 128), (50, 200), (1, 16), (129, 385)])
def test_linear_is_the_product_of_what_was_quantized(kernels, rng, bits, block, n, k):
    q, scales = random_weight(rng, n, k, bits, block)
    weight, packed = dequantize_weight(q, scales, bits, block), cpu_packing.pack(q, scales, bits, block)
    for tokens in (0, 1, 2, 3, 7, 33):
        x = normal(rng, tokens, k)
        bias = normal(rng, n) if tokens % 2 else None
        rows = dequantize_rows(x, block)
        expected = linear(rows, weight, bias)
        magnitude = np.abs(rows) @ np.abs(weight).T + (0 if bias is None else np.abs(bias))
        assert (np.abs(kernels.linear(x, packed, bias, n, bits, block) - expected) <= ROUNDING * magnitude).all()


@pytest.mark.parametrize(("bits", "block"), PACKINGS)
@pytest.mark.parametrize(("heads", "n", "k"), [(5, 16, 130), (3, 33, 8), (40, 32, 16)])
def test_each_head_is_multiplied_by_its_own_weight(kernels, rng, bits, block, heads, n, k):
    pairs = [random_weight(rng, n, k, bits, block) for _ in range(heads)]
    packed = np.stack([cpu_packing.pack(q, scales, bits, block) for q, scales in pairs])
    weight = np.stack([dequantize_weight(q, scales, bits, block) for q, scales in pairs])
    for tokens in (0, 1, 13):
        x, bias = normal(rng, tokens, heads * k), normal(rng, heads * n)
        rows = dequantize_rows(x.reshape(-1, k), block).reshape(x.shape)
        magnitude = head_linear(np.abs(rows), np.abs(weight)) + np.abs(bias)
        found = kernels.linear(x, packed, bias, n, bits, block, heads=heads)
        assert (np.abs(found - head_linear(rows, weight) - bias) <= ROUNDING * magnitude).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_values_do_not_saturate(kernels, bits):
    """All weights at an end of their range, all activations at one of theirs: the largest sums that can be."""
    k = 256
    for value in (0, (1 << bits) - 1):
        packed = cpu_packing.pack(np.full((32, k), value, np.uint8), np.ones((32, 2), np.float32), bits, 128)
        for x in (np.full((1, k), 127, np.float32), np.full((1, k), -127, np.float32)):
            y = kernels.linear(x, packed, None, 32, bits, 128)
            assert (y == x[0, 0] * (value - (1 << (bits - 1))) * k).all()


def test_nan_and_infinity_come_out_as_nan_or_infinity_of_their_row_alone(kernels, rng):
    q, scales = random_weight(rng, 32, 64, 4, 32)
    x = normal(rng, 3, 64)
    x[0, 7], x[1, 40] = np.nan, np.inf
    y = kernels.linear(x, cpu_packing.pack(q, scales, 4, 32), None, 32, 4, 32)
    assert not np.isfinite(y[:2]).any()
    assert np.isfinite(y[2]).all()


# Linear in floats.


@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 96), (33, 130), (160, 300), (128, 1000)])
def test_float_linear_is_the_product(kernels, rng, n, k):
    weight = normal(rng, n, k) / np.float32(k**0.5)
    packed = cpu_packing.pack_floats(weight)
    for tokens in (0, 1, 2, 7, 12, 13, 61):
        x = normal(rng, tokens, k)
        bias = normal(rng, n) if tokens % 2 else None
        expected = linear(x.astype(np.float64), weight.astype(np.float64), bias)
        magnitude = np.abs(x) @ np.abs(weight).T + (0 if bias is None else np.abs(bias))
        assert (np.abs(kernels.float_linear(x, packed, bias, n) - expected) <= 2 * ROUNDING * magnitude).all()


# Experts.


def pack_experts(rng, spec, hidden, width, bits, block):
    """Packed weights by the C function's names, and what they stand for by the spec's."""
    rows = width * (2 if spec.gated else 1)
    pack_up = cpu_packing.pack_gate_up if spec.gated else cpu_packing.pack
    up = [random_weight(rng, rows, hidden, bits, block) for _ in range(variants.EXPERTS)]
    down = [random_weight(rng, hidden, width, bits, block) for _ in range(variants.EXPERTS)]
    packed = {
        "gate_up": np.stack([pack_up(q, s, bits, block) for q, s in up]),
        "down": np.stack([cpu_packing.pack(q, s, bits, block) for q, s in down]),
    }
    plain = {
        "gate_up": np.stack([dequantize_weight(q, s, bits, block) for q, s in up]),
        "down": np.stack([dequantize_weight(q, s, bits, block) for q, s in down]),
    }
    return packed, plain


def routing(rng, tokens, top_k=3):
    index = np.argsort(rng.random((tokens, variants.EXPERTS)), axis=1)[:, :top_k].astype(np.int32)
    return np.ascontiguousarray(index), rng.uniform(0.1, 1.0, (tokens, top_k)).astype(np.float32)


def expected_experts(x, index, weight, plain, spec, block, biases):
    """`experts` with its two inputs of a product quantized; and the magnitude of one step of a hidden value."""
    y, step = np.zeros(x.shape), np.zeros(x.shape)
    rows = dequantize_rows(x, block)
    for token, slot in np.ndindex(index.shape):
        e, scale = index[token, slot], float(weight[token, slot])
        row = rows[token : token + 1] * (scale if spec.weight_on == "input" else 1.0)
        up_bias, down_bias = (biases[name][e] if biases else None for name in ("gate_up_bias", "down_bias"))
        hidden = activate(linear(row, plain["gate_up"][e], up_bias), spec)
        out = linear(dequantize_rows(hidden, block), plain["down"][e], down_bias)[0]
        factor = 1.0 if spec.weight_on == "input" else scale
        y[token] += factor * out
        step[token] += factor * np.abs(hidden).max() / 127 * np.abs(plain["down"][e]).max(axis=1)
    return y, step


def assert_close_experts(y, expected, step):
    """Nearly all hidden values are quantized as float64 has them; one near the middle may fall to the other side.

    That one changes every output of its token, so of one token or two nothing closer than a step can be said.
    """
    error = np.abs(y - expected)
    assert (error <= 2 * step).all()
    if len(y) > 2:
        assert np.median(error / (np.abs(expected).max() + 1e-30)) <= 2e-6


@pytest.mark.parametrize("has_biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("spec", variants.BLOCKS.values(), ids=variants.BLOCKS.keys())
def test_experts_follow_the_spec(kernels, rng, spec, has_biases):
    packed, plain = pack_experts(rng, spec, HIDDEN, WIDTH, 4, 32)
    rows = plain["gate_up"].shape[1]
    biases = {"gate_up_bias": normal(rng, 8, rows), "down_bias": normal(rng, 8, HIDDEN)} if has_biases else {}
    x = normal(rng, 7, HIDDEN) * 4
    index, weight = routing(rng, 7)
    y, checked = kernels.experts(x, index, weight, **packed, spec=spec, width=WIDTH, bits=4, block=32, **biases)
    assert checked == index.size
    assert_close_experts(y, *expected_experts(x, index, weight, plain, spec, 32, biases))


@pytest.mark.parametrize(("bits", "block"), PACKINGS)
@pytest.mark.parametrize("gated", [True, False])
def test_experts_of_every_packing_and_number_of_tokens(kernels, rng, bits, block, gated):
    spec = ExpertsSpec(gated=gated)
    packed, plain = pack_experts(rng, spec, HIDDEN + 8, WIDTH + 100, bits, block)
    for tokens in (0, 1, 2, 33):
        x = normal(rng, tokens, HIDDEN + 8) * 4
        index, weight = routing(rng, tokens)
        y, _ = kernels.experts(x, index, weight, **packed, spec=spec, width=WIDTH + 100, bits=bits, block=block)
        if tokens:
            assert_close_experts(y, *expected_experts(x, index, weight, plain, spec, block, {}))


def test_all_tokens_to_one_expert_more_than_a_group_of_rows(kernels, rng):
    spec = ExpertsSpec()
    packed, plain = pack_experts(rng, spec, HIDDEN, WIDTH, 8, 32)
    x, index, weight = normal(rng, 101, HIDDEN), np.full((101, 1), 5, np.int32), np.ones((101, 1), np.float32)
    y, _ = kernels.experts(x, index, weight, **packed, spec=spec, width=WIDTH, bits=8, block=32)
    assert_close_experts(y, *expected_experts(x, index, weight, plain, spec, 32, {}))


@pytest.mark.parametrize("wrong", [-2, variants.EXPERTS, 2**31 - 1])
def test_index_that_is_no_expert_is_reported_and_nothing_is_written(kernels, rng, wrong):
    packed, _ = pack_experts(rng, ExpertsSpec(), HIDDEN, WIDTH, 4, 32)
    index, weight = routing(rng, 4)
    index[2, 1] = wrong
    arguments = {"spec": ExpertsSpec(), "width": WIDTH, "bits": 4, "block": 32}
    y, checked = kernels.experts(normal(rng, 4, HIDDEN), index, weight, **packed, **arguments)
    assert checked == 2 * 3 + 1
    assert np.isnan(y).all()


def test_result_does_not_depend_on_the_number_of_threads(library, rng):
    packed, _ = pack_experts(rng, ExpertsSpec(), HIDDEN, WIDTH, 4, 32)
    x, (index, weight) = normal(rng, 33, HIDDEN), routing(rng, 33)
    arguments = {"spec": ExpertsSpec(), "width": WIDTH, "bits": 4, "block": 32}
    results = [Kernels(library, "", n).experts(x, index, weight, **packed, **arguments)[0] for n in (1, 2, 5)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


# Router.


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_routers_choose_as_the_spec_does_ties_too(kernels, rng, has_bias):
    for name, spec in (variants.ROUTERS | variants.MODELS).items():
        logits = normal(rng, 40, variants.EXPERTS) * 1.5
        logits[20:] = np.round(logits[20:])  # many ties
        bias = np.round(normal(rng, variants.EXPERTS) * 2) / 4 if has_bias else None
        scale = normal(rng, variants.EXPERTS) if rng.integers(2) else None
        expected_index, expected_weight = route(logits, spec, bias, scale)
        index, weight = kernels.route(logits, spec, bias, scale)
        np.testing.assert_array_equal(index, expected_index, err_msg=name)
        np.testing.assert_allclose(weight, expected_weight, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("experts", [5, 64, 128, 160, 384])
def test_choice_falls_as_numpy_s_where_float32_scores_run_together(kernels, rng, scoring, experts):
    """Logits so close that the order is that of the scores' last bits, and so far apart that scores vanish."""
    spec = RouterSpec(top_k=4, scoring=scoring)
    close = normal(rng, 200, 1) + normal(rng, 200, experts) * np.float32(1e-7)
    logits = np.concatenate([close, normal(rng, 50, experts) * 60])
    expected_index, expected_weight = route(logits, spec)
    index, weight = kernels.route(logits, spec)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(weight, expected_weight, rtol=2e-6)


def test_router_chooses_many_of_many_experts(kernels, rng):
    spec = RouterSpec(top_k=300, n_group=256, topk_group=100, scoring="sigmoid")
    logits = normal(rng, 2, cpu_limits.EXPERTS)
    expected_index, expected_weight = route(logits, spec)
    index, weight = kernels.route(logits, spec)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(weight, expected_weight, rtol=2e-6)


def test_router_sorts_nan_last_and_takes_no_expert_twice(kernels):
    logits = np.array([[np.nan, 1, 2, np.nan], [np.nan] * 4], np.float32)
    index, _ = kernels.route(logits, RouterSpec(top_k=3, scoring="sigmoid"))
    assert index.tolist() == [[2, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("spec", "experts"),
    [
        (RouterSpec(9), 8),
        (RouterSpec(1, n_group=3), 8),
        (RouterSpec(1, n_group=8, group_score="top2_sum"), 8),
        (RouterSpec(5, n_group=4, topk_group=2), 8),
        (RouterSpec(129), 128),
        (RouterSpec(1), cpu_limits.EXPERTS + 1),
    ],
)
def test_router_that_cannot_choose_is_refused(library, spec, experts):
    assert Kernels(library, "").route(np.zeros((1, experts), np.float32), spec) is None
