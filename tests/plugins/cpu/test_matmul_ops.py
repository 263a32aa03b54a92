"""Linear, FloatLinear, HeadLinear, MoEExperts and MoERouter in ONNX Runtime: results, biases, shapes and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from bench import variants
from moevlm.export.formats import cpu_packing
from moevlm.plugins.cpu import limits as cpu_limits
from moevlm.plugins.ops.experts import experts as reference_experts
from moevlm.plugins.ops.experts import linear
from moevlm.plugins.ops.head_linear import head_linear
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec, attributes
from moevlm.runtime.backends import libraries as native

DOMAIN = "moevlm.cpu"
TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "uint8": TensorProto.UINT8}
LINEAR = {"N": 50, "K": 72, "bits": 4, "block_size": 32}
BANK = {"hidden": 72, "width": 40, "bits": 8, "block_size": 32}


def run(op: str, inputs: dict[str, np.ndarray | None], values: dict[str, Any], outputs: int = 1) -> Any:
    """One node in a session of two threads; an input that is None is left out."""
    given = {name: array for name, array in inputs.items() if array is not None}
    names = [name if name in given else "" for name in inputs]
    results = [f"result{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, domain=DOMAIN, **values)],
        "graph",
        [helper.make_tensor_value_info(n, TYPES[a.dtype.name], [None] * a.ndim) for n, a in given.items()],
        [
            helper.make_tensor_value_info(r, TensorProto.INT32 if outputs == 2 and i == 0 else TensorProto.FLOAT, None)
            for i, r in enumerate(results)
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)])
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.operators_path()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, given)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def packed_weight(rng, rows, columns, bits, block, pack=cpu_packing.pack):
    q = rng.integers(0, 1 << bits, (rows, columns), np.uint8)
    size = (2 << bits) * columns**0.5  # products of the size of what they multiply, so that rounding stays small
    scales = (rng.uniform(0.5, 2.0, (rows, -(-columns // block))) / size).astype(np.float16)
    values = (q.astype(np.float32) - (1 << (bits - 1))) * np.repeat(scales, block, axis=1)[:, :columns]
    return pack(q, scales, bits, block), values


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_in_a_session(rng, tokens, has_bias):
    packed, weight = packed_weight(rng, 50, 72, 4, 32)
    x, bias = normal(rng, tokens, 72), normal(rng, 50) if has_bias else None
    (y,) = run("Linear", {"x": x, "weight": packed, "bias": bias}, LINEAR)
    # Activations are rounded to 1/254 of the largest of their block.
    np.testing.assert_allclose(y, linear(x, weight, bias), atol=0.03 * np.abs(weight).sum(axis=1).max())


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("has_bias", [False, True])
def test_float_linear_in_a_session(rng, tokens, has_bias):
    weight, x, bias = normal(rng, 50, 72), normal(rng, tokens, 72), normal(rng, 50) if has_bias else None
    inputs = {"x": x, "weight": cpu_packing.pack_floats(weight), "bias": bias}
    (y,) = run("FloatLinear", inputs, {"N": 50, "K": 72})
    np.testing.assert_allclose(y, linear(x, weight, bias), atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_head_linear_in_a_session(rng, tokens):
    packed, weight = (
        np.stack(parts) for parts in zip(*(packed_weight(rng, 50, 72, 4, 32) for _ in range(3)), strict=True)
    )
    x = normal(rng, tokens, 3 * 72)
    (y,) = run("HeadLinear", {"x": x, "weight": packed}, {"heads": 3, **LINEAR})
    np.testing.assert_allclose(y, head_linear(x, weight), atol=0.03 * np.abs(weight).sum(axis=2).max())


@pytest.mark.parametrize(
    ("values", "columns", "message"),
    [
        ({"heads": 0}, 216, r"HeadLinear: heads = 0 \(allowed: 1 to 1024\)"),
        ({"K": 20000}, 216, r"HeadLinear: K = 20000 \(allowed: 1 to 16384\)"),
        ({}, 215, r"HeadLinear: x has shape \[2, 215\] \(allowed: \[T, heads \* K\] with 216 columns\)"),
        (
            {"N": 65},
            216,
            r"HeadLinear: weight has shape \[3, 3456\], 10368 bytes \(allowed: 15552 bytes for these attributes",
        ),
    ],
    ids=["heads", "width", "rows", "weight"],
)
def test_head_linear_refuses_what_does_not_fit(rng, values, columns, message):
    size = cpu_packing.packed_bytes(50, 72, 4, 32)
    inputs = {"x": normal(rng, 2, columns), "weight": rng.integers(0, 256, (3, size), np.uint8)}
    with pytest.raises(Exception, match=message):
        run("HeadLinear", inputs, {"heads": 3, **LINEAR} | values)


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("name", ["silu-gated-output", "gelu_tanh-plain-input", "swiglu_clamped-gated-input"])
def test_experts_in_a_session(rng, name, has_biases):
    spec = variants.BLOCKS[name]
    rows = 80 if spec.gated else 40
    pack = cpu_packing.pack_gate_up if spec.gated else cpu_packing.pack
    up = [packed_weight(rng, rows, 72, 8, 32, pack) for _ in range(variants.EXPERTS)]
    down = [packed_weight(rng, 72, 40, 8, 32) for _ in range(variants.EXPERTS)]
    biases = [normal(rng, 8, rows), normal(rng, 8, 72)] if has_biases else [None, None]
    x, weight = normal(rng, 5, 72), rng.uniform(0.1, 1, (5, 2)).astype(np.float32)
    index = rng.integers(0, 8, (5, 2), dtype=np.int32)
    arrays = [x, index, weight, np.stack([p for p, _ in up]), np.stack([p for p, _ in down]), *biases]
    names = ("x", "index", "weight", "gate_up", "down", "gate_up_bias", "down_bias")
    plain = np.stack([w for _, w in up]), np.stack([w for _, w in down])
    none = np.full_like(index, -1)
    for chosen in (index, np.where([[1], [0], [1], [0], [1]], index, none), np.where([1, 0], none, index), none):
        arrays[1] = chosen
        (y,) = run("MoEExperts", dict(zip(names, arrays, strict=True)), {**BANK, **attributes(spec)})
        expected = reference_experts(x, chosen, weight, *plain, spec, *biases)
        np.testing.assert_allclose(y, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("has_scale", [False, True], ids=["", "expert_scale"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("spec", variants.MODELS.values(), ids=variants.MODELS.keys())
def test_router_in_a_session(spec, has_bias, has_scale):
    inputs = variants.router_inputs(7, has_bias, has_scale=has_scale)
    given = dict.fromkeys(("logits", "bias", "expert_scale")) | inputs
    index, weight = run("MoERouter", given, attributes(spec), 2)
    expected_index, expected_weight = route(spec=spec, **inputs)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(weight, expected_weight, rtol=2e-6)


def test_router_s_attributes_default_to_the_spec_s():
    logits = variants.router_inputs(3)["logits"]
    index, weight = run("MoERouter", {"logits": logits}, {"top_k": 2}, 2)
    expected_index, expected_weight = route(logits, RouterSpec(2))
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(weight, expected_weight, rtol=2e-6)


@pytest.mark.parametrize(
    ("changes", "columns", "size", "message"),
    [
        ({"bits": 5}, 72, None, r"Linear: bits = 5, block_size = 32, zeros = 0, fp4 = 0 \(allowed: 4 or 8 bits"),
        (
            {"bits": 8, "zeros": 1},
            72,
            None,
            r"Linear: bits = 8, .*, zeros = 1, fp4 = 0 \(allowed: .* zeros or fp4 with",
        ),
        ({"bits": 4, "zeros": 1, "fp4": 1}, 72, None, r"Linear: bits = 4, .*, zeros = 1, fp4 = 1 \(allowed: "),
        ({"block_size": 512}, 72, None, r"Linear: block_size = 512 \(allowed: 16 to 256\)"),
        ({"N": 0}, 72, None, r"Linear: N = 0 \(allowed: 1 to"),
        ({"K": 2**61}, 72, None, r"Linear: K = \d+ \(allowed: 1 to 16777216\)"),
        ({}, 71, None, r"Linear: x has shape \[2, 71\] \(allowed: \[T, K\] with 72 columns\)"),
        ({}, 72, 7, r"Linear: weight has shape \[7\], 7 bytes \(allowed: 3456 bytes for these attributes\)"),
    ],
)
def test_linear_refuses_what_does_not_fit(rng, changes, columns, size, message):
    packed, _ = packed_weight(rng, 50, 72, 4, 32)
    weight = packed.reshape(-1)[:size]
    with pytest.raises(Exception, match=message):
        run("Linear", {"x": normal(rng, 2, columns), "weight": weight}, {**LINEAR, **changes})


@pytest.mark.parametrize(
    ("values", "columns", "message"),
    [
        ({"N": 0, "K": 72}, 72, r"FloatLinear: N = 0 \(allowed: 1 to"),
        ({"K": 72}, 72, r"FloatLinear: attribute N is missing"),
        ({"N": 50, "K": 72}, 71, r"FloatLinear: x has shape \[2, 71\] \(allowed: \[T, K\] with 72 columns\)"),
        ({"N": 65, "K": 72}, 72, r"FloatLinear: weight has shape \[2, 2304\], 4608 values \(allowed: 6912 for these"),
    ],
)
def test_float_linear_refuses_what_does_not_fit(rng, values, columns, message):
    inputs = {"x": normal(rng, 2, columns), "weight": cpu_packing.pack_floats(normal(rng, 50, 72))}
    with pytest.raises(Exception, match=message):
        run("FloatLinear", inputs, values)


@pytest.mark.parametrize(
    ("changes", "index", "message"),
    [
        ({}, [[0, 8]], r"MoEExperts: expert_index\[0, 1\] = 8 \(allowed: 0 to 7, or -1 for none\)"),
        ({}, [[-2, 1]], r"MoEExperts: expert_index\[0, 0\] = -2 \(allowed: 0 to 7, or -1 for none\)"),
        ({}, [[1, 1], [1, 1]], r"MoEExperts: expert_index has shape \[2, 2\] \(allowed: \[1, top_k\]\)"),
        ({}, [0, 1], r"MoEExperts: expert_index has shape \[2\] \(allowed: \[1, top_k\]\)"),
        ({}, [[]], r"MoEExperts: expert_index has shape \[1, 0\] \(allowed: \[1, top_k\]\)"),
        ({"gated": 2}, [[0, 1]], r"MoEExperts: gated = 2 \(allowed: 0 to 1\)"),
        ({"activation": "relu2"}, [[0, 1]], r'activation = "relu2" \(allowed: silu, gelu_tanh, swiglu_clamped\)'),
        ({"activation": "x" * 99}, [[0, 1]], r"activation is 99 characters long \(allowed: silu"),
        ({"activation": "swiglu_clamped", "gated": 0}, [[0, 1]], r'"swiglu_clamped" needs gated = 1'),
        ({"width": 41}, [[0, 1]], r"MoEExperts: down has shape \[8, \d+\], \d+ bytes \(allowed: \d+ bytes"),
    ],
)
def test_experts_refuse_what_does_not_fit(rng, changes, index, message):
    bank = {**BANK, "width": 64}
    up, down = cpu_packing.packed_bytes(128, 72, 8, 32), cpu_packing.packed_bytes(72, 64, 8, 32)
    if "width" in changes:
        bank["width"], up = 41, cpu_packing.packed_bytes(96, 72, 8, 32)
        down += 1
    inputs = {
        "x": normal(rng, 1, 72),
        "index": np.array(index, np.int32),
        "weight": np.ones(np.shape(index), np.float32),
        "gate_up": np.zeros((8, up), np.uint8),
        "down": np.zeros((8, down), np.uint8),
    }
    values = {**bank, **attributes(ExpertsSpec()), **{k: v for k, v in changes.items() if k != "width"}}
    with pytest.raises(Exception, match=message):
        run("MoEExperts", inputs, values)


def test_router_refuses_more_experts_than_there_are():
    message = r"MoERouter: no choice of top_k = 9 from 8 experts in n_group = 1 groups"
    with pytest.raises(Exception, match=message):
        run("MoERouter", {"logits": np.zeros((1, 8), np.float32)}, {"top_k": 9}, 2)


@pytest.mark.parametrize("changes", [{"n_group": -1}, {"topk_group": 2**62}, {"top_k": 0}, {"renormalize": 7}])
def test_router_refuses_attributes_out_of_range(changes):
    (name,) = changes
    with pytest.raises(Exception, match=rf"MoERouter: {name} = {changes[name]} \(allowed: [01] to"):
        run("MoERouter", {"logits": np.zeros((1, 8), np.float32)}, {"top_k": 1, **changes}, 2)


def bank_inputs(gate_up: np.ndarray, down: np.ndarray) -> dict[str, np.ndarray]:
    index = np.zeros((1, 1), np.int32)
    return {"x": np.ones((1, 1), np.float32), "index": index, "weight": np.ones((1, 1), np.float32)} | {
        "gate_up": gate_up,
        "down": down,
    }


@pytest.mark.parametrize("experts", [0, 2**61, 2**62])
def test_experts_refuse_banks_whose_size_does_not_fit_into_an_integer(experts):
    empty = np.zeros((experts, 0), np.uint8)
    with pytest.raises(Exception, match=rf"gate_up has shape \[{experts}, 0\] \(allowed: \[E, bytes\], E from 1 to"):
        run("MoEExperts", bank_inputs(empty, empty), {"hidden": 1, "width": 1, "bits": 8, "block_size": 16})


def test_limits_are_those_that_export_is_told():
    bank = {"hidden": 1, "width": 1, "bits": 8, "block_size": 16}
    for experts in (cpu_limits.EXPERTS, cpu_limits.EXPERTS + 1):
        weight = np.zeros((experts, cpu_packing.packed_bytes(32, 1, 8, 16)), np.uint8)
        logits, choice = np.zeros((1, experts), np.float32), {"top_k": experts}
        if experts == cpu_limits.EXPERTS:
            assert run("MoEExperts", bank_inputs(weight, weight), bank) == [0]
            assert run("MoERouter", {"logits": logits}, choice, 2)[0].shape == (1, experts)
        else:
            with pytest.raises(Exception, match=rf"E from 1 to {cpu_limits.EXPERTS}\)"):
                run("MoEExperts", bank_inputs(weight, weight), bank)
            with pytest.raises(Exception, match=rf"top_k = {experts} \(allowed: 1 to {cpu_limits.EXPERTS}\)"):
                run("MoERouter", {"logits": logits}, choice, 2)
    x, weight = np.zeros((1, 16), np.float32), np.zeros(0, np.uint8)
    for op, inputs, values in (
        ("Linear", {"x": x, "weight": weight}, LINEAR),
        ("MoEExperts", bank_inputs(weight, weight), BANK),
    ):
        for name in list(values)[:2]:
            with pytest.raises(Exception, match="has shape"):  # the attribute was taken
                run(op, inputs, {**values, name: cpu_limits.WIDTH})
            with pytest.raises(Exception, match=rf"{name} = \d+ \(allowed: 1 to {cpu_limits.WIDTH}\)"):
                run(op, inputs, {**values, name: cpu_limits.WIDTH + 1})
