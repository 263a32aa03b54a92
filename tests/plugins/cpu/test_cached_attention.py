"""The native CachedAttention against float64 numpy: shapes, caches of both types, in place and copied, and errors."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from moevlm.plugins.cpu import limits as cpu_limits
from moevlm.runtime.backends import libraries as native
from moevlm.runtime.core.errors import EngineError

# Of the largest result. Sums in float32 of up to some hundred products.
TOLERANCE = 2e-6
INPUTS = ("qkv", "cos", "sin", "key_cache", "value_cache", "cache_position", "q_norm", "k_norm")
ONNX_TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8}


@dataclass(frozen=True)
class Case:
    batch: int = 1
    length: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rotary_dim: int = 32
    past: int = 10  # of the sequence that has most
    norm: bool = False
    dtype: str = "float32"
    threads: int = 2
    epsilon: float = 1e-6

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Case, name)}
        return ",".join(f"{name}={value}" for name, value in changed.items()) or "default"

    @property
    def capacity(self) -> int:
        return self.past + self.length + 3


SHAPES = [
    Case(),
    Case(head_dim=16, rotary_dim=16, heads=1, kv_heads=1),
    Case(head_dim=24, rotary_dim=8, heads=3, kv_heads=1, length=2),
    Case(head_dim=64, heads=8, kv_heads=2, batch=3, past=40, rotary_dim=64),
    Case(head_dim=80, heads=5, kv_heads=1, length=7, past=20),
    Case(head_dim=128, rotary_dim=128, heads=16, kv_heads=4, past=700),
    Case(head_dim=128, rotary_dim=64, heads=16, kv_heads=1, length=2, past=600, batch=2),
    Case(head_dim=256, rotary_dim=64, heads=6, kv_heads=2, length=7, past=300, batch=2),
    Case(head_dim=512, rotary_dim=0, heads=2, kv_heads=1, length=64, past=5),
    Case(head_dim=64, rotary_dim=64, heads=14, kv_heads=2, length=64, past=9, batch=2),
    Case(head_dim=128, rotary_dim=128, heads=4, kv_heads=1, length=200, past=90),
    Case(head_dim=80, rotary_dim=40, heads=4, kv_heads=4, length=200, past=0, batch=2),
    Case(head_dim=32, heads=2, kv_heads=1, length=64, past=1500),
    Case(head_dim=256, rotary_dim=256, heads=4, kv_heads=2, length=200, past=33),
    Case(head_dim=64, rotary_dim=64, heads=71, kv_heads=1, past=300),
    Case(head_dim=24, rotary_dim=8, heads=34, kv_heads=2, length=70, past=300, batch=2),
    Case(head_dim=50, rotary_dim=50, heads=6, kv_heads=3, past=700),
]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@cache
def session(case: Case, without: str = "", **attributes: Any) -> ort.InferenceSession:
    """Open in every dimension: sessions depend on the attributes only. without: an input whose name is left empty."""
    attributes = {
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "rotary_dim": case.rotary_dim,
        "epsilon": case.epsilon,
    } | attributes
    caches = ONNX_TYPES[case.dtype]
    types = dict.fromkeys(INPUTS, TensorProto.FLOAT) | {"key_cache": caches, "value_cache": caches}
    types["cache_position"] = TensorProto.INT64
    ranks = {"qkv": 2, "cos": 3, "sin": 3, "key_cache": 4, "value_cache": 4}
    names = INPUTS if case.norm else INPUTS[:6]
    outputs = {"y": (TensorProto.FLOAT, 2), "key_cache_out": (caches, 4), "value_cache_out": (caches, 4)}
    given = ["" if name == without else name for name in names]
    node = helper.make_node("CachedAttention", given, outputs, domain="moevlm.cpu", **attributes)
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, types[name], [None] * ranks.get(name, 1)) for name in given if name],
        [helper.make_tensor_value_info(name, kind, [None] * rank) for name, (kind, rank) in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moevlm.cpu", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.operators_path()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def sessions(case: Case) -> ort.InferenceSession:
    return session(replace(case, batch=0, length=0, head_dim=0, past=0))


def quantize(rows: np.ndarray) -> np.ndarray:
    """[..., D] -> [..., D + 4] int8: symmetric per row, and the row's scale."""
    scale = (np.abs(rows).max(-1, keepdims=True) / 127).astype(np.float32)
    values = np.rint(np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)).astype(np.int8)
    return np.concatenate([values, scale.view(np.int8)], axis=-1)


def dequantize(rows: np.ndarray) -> np.ndarray:
    if rows.dtype != np.int8:
        return rows.astype(np.float64)
    return rows[..., :-4] * np.ascontiguousarray(rows[..., -4:]).view(np.float32).astype(np.float64)


def make_inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    angle = rng.uniform(0, 6, (case.batch, case.length, case.rotary_dim // 2))
    cache = (case.batch, case.kv_heads, case.capacity, case.head_dim)
    inputs = {
        "qkv": normal(case.batch * case.length, (case.heads + 2 * case.kv_heads) * case.head_dim),
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "key_cache": normal(*cache),
        "value_cache": normal(*cache),
        "cache_position": np.array([case.past, *rng.integers(0, case.past + 1, case.batch - 1)]),
    }
    if case.norm:
        inputs |= {"q_norm": normal(case.head_dim), "k_norm": normal(case.head_dim)}
    if case.dtype == "int8":
        inputs |= {name: quantize(inputs[name]) for name in ("key_cache", "value_cache")}
    return inputs


def prepared(case: Case, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """q, k, v [B, S, heads, D] in float64, normalised and rotated."""
    qkv = inputs["qkv"].astype(np.float64).reshape(case.batch, case.length, -1, case.head_dim)
    q, k, v = np.split(qkv, [case.heads, case.heads + case.kv_heads], axis=2)
    if case.norm:
        q, k = (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + case.epsilon) * inputs[name].astype(np.float64)
            for x, name in ((q, "q_norm"), (k, "k_norm"))
        )
    cos, sin = (inputs[name].astype(np.float64)[:, :, None] for name in ("cos", "sin"))
    half = case.rotary_dim // 2

    def rotated(x: np.ndarray) -> np.ndarray:
        a, b, rest = np.split(x, [half, 2 * half], axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    return [rotated(q), rotated(k), v]


def attention(case: Case, q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: np.ndarray) -> np.ndarray:
    """q [B, S, heads, D], keys, values [B, kv_heads, C, D] -> [B * S, heads * D], all in float64."""
    group = case.heads // case.kv_heads
    grouped = q.reshape(case.batch, case.length, case.kv_heads, group, case.head_dim)
    scores = np.einsum("bskgd,bkcd->bkgsc", grouped, keys, optimize=True) / np.sqrt(case.head_dim)
    last = position[:, None] + np.arange(case.length)
    hidden = np.arange(keys.shape[2]) > last[:, None, None, :, None]
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bkgsc,bkcd->bskgd", weights, values, optimize=True).reshape(case.batch * case.length, -1)


def check(case: Case, inputs: dict[str, np.ndarray], outputs: list[np.ndarray]) -> None:
    y, *caches = outputs
    q, *new = prepared(case, inputs)
    for name, written, rows in zip(("key_cache", "value_cache"), caches, new, strict=True):
        expected = inputs[name].copy()
        for b, position in enumerate(inputs["cache_position"]):
            new_rows = slice(position, position + case.length)
            ours, theirs = written[b, :, new_rows], rows[b].swapaxes(0, 1)
            # A value between two steps may be rounded to either.
            step = np.abs(theirs).max(-1, keepdims=True) / 127 if case.dtype == "int8" else 0
            error = np.abs(dequantize(ours) - theirs)
            assert (error <= step * 0.5001 + 1e-6 * np.abs(theirs).max()).all()
            expected[b, :, new_rows] = ours
        np.testing.assert_array_equal(written, expected)  # nothing else was touched
    # The caches as they were written, so that rounding to int8 is not held against the attention.
    expected = attention(case, q, *map(dequantize, caches), inputs["cache_position"])
    assert np.abs(y - expected).max() <= TOLERANCE * np.abs(expected).max()


def run(case: Case, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return sessions(case).run(None, inputs)


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape: Case, norm: bool, dtype: str, rng: np.random.Generator) -> None:
    case = replace(shape, norm=norm, dtype=dtype)
    inputs = make_inputs(case, rng)
    check(case, inputs, run(case, inputs))


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("several", [False, True], ids=["one head", "groups"])
def test_every_head_size_over_several_blocks_of_keys_and_rows(
    several: bool, dtype: str, rng: np.random.Generator
) -> None:
    # Vectors of 16, 8, 4 and 2 floats.
    for i, head_dim in enumerate([*range(8, cpu_limits.HEAD_DIM + 1, 8 + 8 * several), 2, 6, 50, 100, 180, 250, 510]):
        group = (3, 4, 5, 8, 16)[i % 5] if several else 1
        length = max(200 // group, 40)  # rows of several tiles; a block of the widest heads is 16 or 32 keys
        case = Case(length=length, heads=group, kv_heads=1, head_dim=head_dim, rotary_dim=0, past=150, dtype=dtype)
        inputs = make_inputs(case, rng)
        check(case, inputs, run(case, inputs))


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("length", [1, 7, 200])
def test_threads_do_not_change_a_bit(length: int, dtype: str, rng: np.random.Generator) -> None:
    case = Case(batch=2, length=length, head_dim=64, past=900, dtype=dtype)
    inputs = make_inputs(case, rng)
    for ours, theirs in zip(run(case, inputs), run(replace(case, threads=1), inputs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("length", [1, 64])
def test_caches_bound_to_themselves_are_updated_in_place(length: int, dtype: str, rng: np.random.Generator) -> None:
    case = Case(batch=2, length=length, head_dim=64, past=300, dtype=dtype)
    inputs = make_inputs(case, rng)
    binding = sessions(case).io_binding()
    caches = {name: ort.OrtValue.ortvalue_from_numpy(inputs[name]) for name in ("key_cache", "value_cache")}
    for name, array in inputs.items():
        if name in caches:
            binding.bind_ortvalue_input(name, caches[name])
            binding.bind_ortvalue_output(f"{name}_out", caches[name])
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    sessions(case).run_with_iobinding(binding)
    y = binding.get_outputs()[-1].numpy()
    updated = [value.numpy() for value in caches.values()]
    check(case, inputs, [y, *updated])
    for ours, copied in zip([y, *updated], run(case, inputs), strict=True):
        np.testing.assert_array_equal(ours, copied)


def test_tokens_in_steps_equal_tokens_at_once(rng: np.random.Generator) -> None:
    case = Case(batch=2, length=30, head_dim=64, heads=8, kv_heads=2, past=250)
    inputs = make_inputs(case, rng)
    whole, key_cache, value_cache = run(case, inputs)
    state = inputs | {}
    parts = []
    for part in (range(16), range(16, 17), range(17, 30)):
        at = slice(part.start, part.stop)
        step = state | {
            "qkv": inputs["qkv"].reshape(2, 30, -1)[:, at].reshape(2 * len(part), -1),
            "cos": inputs["cos"][:, at],
            "sin": inputs["sin"][:, at],
            "cache_position": inputs["cache_position"] + part.start,
        }
        y, state["key_cache"], state["value_cache"] = run(case, step)
        parts.append(y.reshape(2, len(part), -1))
    np.testing.assert_array_equal(state["key_cache"], key_cache)
    np.testing.assert_array_equal(state["value_cache"], value_cache)
    whole = whole.reshape(2, 30, -1)
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() <= TOLERANCE * np.abs(whole).max()


def test_entries_past_the_last_token_are_never_read(rng: np.random.Generator) -> None:
    for length in (1, 40):
        case = Case(batch=2, length=length, head_dim=64, past=70)
        inputs = make_inputs(case, rng)
        expected = run(case, inputs)[0]
        for b, position in enumerate(inputs["cache_position"]):
            for name in ("key_cache", "value_cache"):
                inputs[name][b, :, position:] = np.nan
        np.testing.assert_array_equal(run(case, inputs)[0], expected)


def test_large_scores_do_not_overflow(rng: np.random.Generator) -> None:
    for length in (1, 40):
        case = Case(length=length, head_dim=64, rotary_dim=0, past=500)
        inputs = make_inputs(case, rng)
        inputs["qkv"] *= 30
        y, keys, values = run(case, inputs)
        q = prepared(case, inputs)[0]
        expected = attention(case, q, dequantize(keys), dequantize(values), inputs["cache_position"])
        assert np.abs(y - expected).max() <= 1e-3 * np.abs(expected).max()  # scores of a thousand, in float32


def test_zeros_are_quantized_to_zeros(rng: np.random.Generator) -> None:
    case = Case(dtype="int8")
    inputs = make_inputs(case, rng) | {"qkv": np.zeros((1, 8 * 32), np.float32)}
    y, keys, _ = run(case, inputs)
    assert np.isfinite(y).all()
    assert not keys[:, :, case.past].any()


def test_no_tokens_leave_the_caches_as_they_are(rng: np.random.Generator) -> None:
    case = Case(batch=2, length=0)
    inputs = make_inputs(case, rng)
    y, keys, values = run(case, inputs)
    assert y.shape == (0, 4 * 32)
    np.testing.assert_array_equal(keys, inputs["key_cache"])
    np.testing.assert_array_equal(values, inputs["value_cache"])


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Case,
        batch=st.integers(1, 3),
        length=st.integers(1, 50),
        kv_heads=st.integers(1, 3),
        heads=st.integers(1, 16),  # of a group; see the body
        head_dim=st.sampled_from([8, 16, 24, 40, 64, 72, 96, 128]),
        rotary_dim=st.sampled_from([0, 2, 6, 8]),
        past=st.one_of(st.integers(0, 40), st.integers(230, 600)),
        norm=st.booleans(),
        dtype=st.sampled_from(list(ONNX_TYPES)),
    ),
    st.integers(0, 2**32),
)
def test_agrees_with_float64_in_any_shape(case: Case, seed: int) -> None:
    case = replace(case, heads=case.heads * case.kv_heads)
    inputs = make_inputs(case, np.random.default_rng(seed))
    check(case, inputs, run(case, inputs))


F32 = np.float32
BAD_INPUTS = {
    "cache_position": [
        (np.array([-1]), "cache_position[0] = -1 (allowed: 0 to 13, for 1 more tokens in a cache of 14)"),
        (np.array([14]), "cache_position[0] = 14 (allowed: 0 to 13"),
        (np.array([1, 2]), "cache_position has shape [2] (allowed: [1], a number per sequence)"),
    ],
    "qkv": [
        (np.zeros((1, 100), F32), "qkv has shape [1, 100] (allowed: [B * S, 8 * head_dim], head_dim even, 2 to 512)"),
        (np.zeros((1, 8), F32), "qkv has shape [1, 8] (allowed"),
        (np.zeros((1, 8 * 514), F32), "qkv has shape [1, 4112] (allowed"),
        (np.zeros((2, 256), F32), "qkv has shape [2, 256] (allowed: [1, 256], a row for each token of cos"),
    ],
    "cos": [
        (np.zeros((1, 1, 8), F32), "cos has shape [1, 1, 8] (allowed: [1, 1, 16], [B, S, rotary_dim / 2])"),
        (np.zeros((2**31, 1, 0), F32), "cos has shape [2147483648, 1, 0] (allowed: B * S up to 2147483647)"),
        (np.zeros((2**40, 2**20, 0), F32), "cos has shape [1099511627776, 1048576, 0] (allowed: B * S up to"),
        (np.zeros((1, 0, 2**60), F32), "qkv has shape [1, 256] (allowed: [0, 256], a row for each token"),
    ],
    "sin": [(np.zeros((1, 2, 16), F32), "sin has shape [1, 2, 16] (allowed: [1, 1, 16], that of cos)")],
    "key_cache": [(np.zeros((1, 2, 14, 36), F32), "key_cache has shape [1, 2, 14, 36] (allowed: [1, 2, 14, 32]")],
    "value_cache": [(np.zeros((1, 2, 15, 32), F32), "value_cache has shape [1, 2, 15, 32] (allowed: [1, 2, 14, 32]")],
    "q_norm": [(np.zeros(16, F32), "q_norm has shape [16] (allowed: [32], [head_dim])")],
    "k_norm": [(np.zeros(16, F32), "k_norm has shape [16] (allowed: [32], [head_dim])")],
}


@pytest.mark.parametrize(
    ("name", "value", "message"), [(name, *bad) for name, cases in BAD_INPUTS.items() for bad in cases]
)
def test_bad_input_is_refused_by_name(name: str, value: np.ndarray, message: str, rng: np.random.Generator) -> None:
    case = Case(norm=True)
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as caught:
        run(case, make_inputs(case, rng) | {name: value})
    assert f"CachedAttention: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"heads": 0}, "heads = 0 (allowed: 1 to 1024)"),
        ({"heads": 2**61, "kv_heads": 2**61}, f"heads = {2**61} (allowed: 1 to 1024)"),
        ({"kv_heads": 3}, "kv_heads = 3 with heads = 4 (allowed: a divisor of heads)"),
        ({"kv_heads": 0}, "kv_heads = 0 (allowed: 1 to 4)"),
        ({"rotary_dim": 7}, "rotary_dim = 7 (allowed: even)"),
        ({"rotary_dim": -2}, "rotary_dim = -2 (allowed: 0 to 512)"),
        ({"epsilon": -1.0}, "epsilon = -1 (allowed: 0 or more)"),
        ({"rotary_dim": "all"}, "attribute rotary_dim is missing (an integer)"),
    ],
)
def test_bad_attribute_is_refused_by_name(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception) as caught:
        session(Case(), **attributes)
    assert f"CachedAttention: {message}" in str(caught.value)


def test_rotary_dim_beyond_head_dim_is_refused(rng: np.random.Generator) -> None:
    case = Case(rotary_dim=64)
    with pytest.raises(Exception, match=r"rotary_dim = 64 \(allowed: up to head_dim, which is 32\)"):
        run(case, make_inputs(case, rng))


def test_a_library_that_was_not_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "OPERATORS", "absent")
    with pytest.raises(EngineError, match=r"absent was not built in .* \(install g\+\+, then pip install"):
        native.operators_path()


@pytest.mark.parametrize("missing", INPUTS[:6])
def test_an_input_that_is_left_out_is_refused(missing: str) -> None:
    with pytest.raises(Exception, match=rf"input {INPUTS.index(missing)} is marked single but has an empty string"):
        session(Case(), without=missing)


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("length", [1, 40])
def test_nan_or_infinity_in_a_sequence_leaves_the_others_alone(
    length: int, value: float, dtype: str, rng: np.random.Generator
) -> None:
    case = Case(batch=2, length=length, past=150, dtype=dtype)
    inputs = make_inputs(case, rng)
    expected = run(case, inputs)[0].reshape(2, -1)[1]
    for name in ("qkv", "cos", "key_cache", "value_cache"):
        given = inputs | {name: inputs[name].copy()}
        first = given[name][: length if name == "qkv" else 1]
        if first.dtype == np.int8:
            first.reshape(-1, first.shape[-1])[::7, -4:] = np.array([value], np.float32).view(np.int8)
        else:
            first.reshape(-1)[::7] = value
        y = run(case, given)[0].reshape(2, -1)
        np.testing.assert_array_equal(y[1], expected)
        assert np.isnan(value) <= np.isnan(y[0]).all()


def test_no_sequences_are_no_work_whatever_the_other_sizes(rng: np.random.Generator) -> None:
    case = Case(rotary_dim=0)
    inputs = {name: array[:0] for name, array in make_inputs(case, rng).items()}
    inputs |= {name: np.zeros((0, 2, 2**50, 32), F32) for name in ("key_cache", "value_cache")}
    inputs |= {name: np.zeros((0, 2**50, 0), F32) for name in ("cos", "sin")}
    y, keys, _ = run(case, inputs)
    assert y.shape == (0, 4 * 32)
    assert keys.shape == (0, 2, 2**50, 32)


def test_limits_are_those_that_export_is_told(rng: np.random.Generator) -> None:
    session(Case(), heads=cpu_limits.HEADS)
    with pytest.raises(Exception, match=rf"allowed: 1 to {cpu_limits.HEADS}\)"):
        session(Case(), heads=cpu_limits.HEADS + 1)
    case = Case(head_dim=cpu_limits.HEAD_DIM, rotary_dim=0)
    run(case, make_inputs(case, rng))
    wider = replace(case, head_dim=case.head_dim + 2)
    with pytest.raises(Exception, match=f"head_dim even, 2 to {cpu_limits.HEAD_DIM}"):
        run(wider, make_inputs(wider, rng))
