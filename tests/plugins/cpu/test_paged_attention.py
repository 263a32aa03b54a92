"""The native PagedAttention against float64 numpy: attributes, mixtures of sequences, pages of both types, errors."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moevlm.plugins.cpu import limits as cpu_limits
from tests.support.paged_attention import (
    INPUTS,
    ONNX_TYPES,
    OPTIONAL,
    Case,
    check,
    make_inputs,
    run,
    sequence_rows,
    session,
    to_rows,
)

MLA = Case(key_dim=96, value_dim=64, rotary_dim=32, rotary_start=64, heads=5, kv_heads=1, value_in_key=True)
CASES = [
    Case(),
    Case(((0, 1),)),
    Case(((0, 40), (300, 1), (7, 0), (63, 2), (0, 1))),
    Case(((700, 1), (255, 1), (256, 1), (511, 3), (130, 200))),
    Case(((64, 1), (128, 30)), key_dim=128, value_dim=128, heads=32, kv_heads=4, rotary_dim=128),
    Case(((300, 40), (290, 1)), shared=4, key_dim=64, value_dim=64, heads=16, kv_heads=2, rotary_dim=64),
    Case(((40, 3), (33, 20)), page=16, shared=2, rotary_dim=10),
    Case(((100, 3), (0, 50)), page=48, rotary_dim=0),
    Case(((200, 150),), page=160, heads=3, kv_heads=3),
    Case(((600, 1), (20, 70)), heads=71, kv_heads=1, key_dim=64, value_dim=64),
    Case(((300, 70), (30, 1)), heads=34, kv_heads=2, key_dim=24, value_dim=40, rotary_dim=8),
    Case(((300, 70), (400, 1)), key_dim=50, value_dim=18, rotary_dim=50),
    Case(((300, 5),), key_dim=2, value_dim=2, rotary_dim=2),
    Case(((150, 30), (150, 1)), key_dim=512, value_dim=512, rotary_dim=512, heads=6),
    Case(((300, 20), (10, 1)), key_dim=192, value_dim=128, rotary_dim=64, rotary_start=128, norm=True),
    Case(((300, 1), (10, 200), (300, 17)), window=16),
    Case(((300, 1), (10, 400), (700, 17)), window=300, heads=3, kv_heads=3),
    Case(((300, 1), (10, 50)), window=1),
    Case(((300, 1), (10, 200), (300, 17)), chunk=16),
    Case(((900, 1), (10, 400), (600, 80)), chunk=300, heads=3, kv_heads=3),
    Case(((900, 1), (512, 1), (500, 80), (511, 1)), chunk=256, heads=8, kv_heads=1),
    Case(((700, 1), (10, 400)), chunk=100, window=30, images=True, longest=90, sinks=True),
    Case(((300, 1), (10, 50)), softcap=2.0, sinks=True, scale=0.5),
    Case(((300, 1), (10, 50)), softcap=30.0, window=100, norm=True, sinks=True),
    Case(((600, 1), (10, 50)), sinks=True, heads=6, scale=0.01),
    Case(((300, 30), (77, 1), (0, 1)), norm=True, epsilon=0.1, rotary_dim=16, rotary_start=6),
    Case(((0, 40), (300, 1), (7, 0), (200, 90), (63, 2)), images=True),
    Case(((10, 400), (250, 70), (700, 17)), images=True, window=50, longest=300, heads=3, kv_heads=3, norm=True),
    Case(((0, 300), (100, 3)), images=True, longest=300, heads=40, kv_heads=2, softcap=30.0, sinks=True),
    Case(((200, 150), (30, 1)), images=True, longest=140, window=100, heads=4, key_dim=256, value_dim=256, scale=0.05),
    replace(MLA, sequences=((300, 1), (10, 200), (0, 1)), images=True),
    Case(((300, 1), (10, 50)), value_norm=True, epsilon=0.1, key_dim=40, value_dim=24, norm=True),
    Case(((100, 3), (0, 50)), value_is_key=True, value_norm=True, heads=16, key_dim=512, value_dim=512, norm=True),
    Case(((100, 3), (0, 50)), value_is_key=True, rotary_dim=0),
    replace(MLA, sequences=((300, 1), (10, 200), (0, 1))),
    replace(MLA, sequences=((300, 1), (10, 20)), key_dim=576, value_dim=512, heads=16, rotary_start=512, rotary_dim=64),
    replace(MLA, sequences=((300, 1), (10, 20)), key_dim=26, value_dim=26, heads=40, rotary_start=10, rotary_dim=16),
]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def bits(array: np.ndarray) -> np.ndarray:
    """A sign of zero counts, and so does which NaN it is."""
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case: Case, dtype: str, rng: np.random.Generator) -> None:
    case = replace(case, dtype=dtype)
    inputs = make_inputs(case, rng)
    check(case, inputs, run(case, inputs))


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("several", [False, True], ids=["one head", "groups"])
def test_every_head_size_over_several_blocks_of_keys_and_rows(
    several: bool, dtype: str, rng: np.random.Generator
) -> None:
    # Vectors of 16, 8, 4 and 2 floats.
    for i, dim in enumerate([*range(8, cpu_limits.VALUE_DIM + 1, 8 + 8 * several), 2, 6, 50, 100, 180, 250, 510]):
        group = (3, 4, 5, 8, 16)[i % 5] if several else 1
        new = max(160 // group, 30)
        case = Case(((190, new), (3 * i, 1)), group, 1, dim, max(dim - 8 * (i % 3), 2), rotary_dim=0, dtype=dtype)
        inputs = make_inputs(case, rng)
        check(case, inputs, run(case, inputs))


def mixed_sequences(most: int = 4) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    past = st.one_of(st.integers(0, 40), st.integers(240, 300), st.integers(500, 530))
    new = st.one_of(st.integers(0, 1), st.integers(2, 60))
    return st.lists(st.tuples(past, new), min_size=1, max_size=most).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 3))
    value_in_key = draw(st.booleans())
    key_dim = draw(st.sampled_from([2, 8, 16, 24, 40, 64, 72, 96, 128]))
    value_dim = draw(st.sampled_from([dim for dim in (2, 8, 16, 32, 64, 128) if dim <= key_dim or not value_in_key]))
    value_is_key = not value_in_key and draw(st.sampled_from([False, False, True]))
    value_dim = key_dim if value_is_key else value_dim
    rotary_dim = 2 * draw(st.integers(0, key_dim // 2))
    return Case(
        sequences=draw(mixed_sequences()),
        heads=kv_heads * draw(st.integers(1, 16)),
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        rotary_dim=rotary_dim,
        rotary_start=draw(st.integers(0, key_dim - rotary_dim)),
        scale=draw(st.sampled_from([0.0, 0.3])),
        window=draw(st.sampled_from([0, 0, 1, 7, 64, 250])),
        chunk=draw(st.sampled_from([0, 0, 1, 9, 64, 250])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.0, 50.0])),
        value_in_key=value_in_key,
        value_is_key=value_is_key,
        value_norm=not value_in_key and draw(st.booleans()),
        norm=draw(st.booleans()),
        sinks=draw(st.booleans()),
        images=draw(st.sampled_from([False, False, True])),
        dtype=draw(st.sampled_from(list(ONNX_TYPES))),
        page=draw(st.sampled_from([64, 64, 16, 48])),
    )


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 2**32))
def test_agrees_with_float64_in_any_shape(case: Case, seed: int) -> None:
    inputs = make_inputs(case, np.random.default_rng(seed))
    check(case, inputs, run(case, inputs))


def in_steps(case: Case, rng: np.random.Generator, whole: dict[str, np.ndarray], cuts: list[int], alone: bool) -> dict:
    """The tokens of `whole`, a call of one sequence, in several calls cut at `cuts`, each among others unless alone.

    Returns y of these tokens, and the rows that they have in the caches at the end.
    """
    (past, new) = case.sequences[0]
    caches = [name for name in ("key_cache", "value_cache") if name in whole]
    kept = {name: whole[name] for name in caches}
    y = []
    for begin, end in zip([0, *cuts], [*cuts, new], strict=True):
        before, behind = ([], []) if alone else (list(rng.integers(0, 4, 2)) for _ in range(2))
        others = {n: (int(rng.choice([0, 5, 250, 300])), int(rng.choice([0, 1, 3, 20]))) for n in range(4)}
        sequences = [*(others[n] for n in before), (past + begin, end - begin), *(others[n] for n in behind)]
        step_case = replace(case, sequences=tuple(sequences), threads=int(rng.integers(1, 4)))
        step = make_inputs(step_case, rng)
        mine = len(before)
        first, last = step["query_start"][mine : mine + 2]
        for name in {"qkv", "cos", "sin", "visible_end"} & whole.keys():
            step[name][first:last] = whole[name][begin:end]
        step |= {name: whole[name] for name in ("q_norm", "k_norm", "sinks") if name in whole}
        used = -(-(past + end) // case.page)
        ours = step["page_table"][mine, :used]
        for name in caches:
            step[name][ours] = kept[name][whole["page_table"][0, :used]]
        outputs = run(step_case, step)
        y.append(outputs["y"][first:last])
        for name in caches:
            kept[name] = kept[name].copy()
            kept[name][whole["page_table"][0, :used]] = outputs[f"{name}_out"][ours]
    rows = {
        name: sequence_rows(to_rows(kept[name], name == "key_cache"), whole["page_table"][0], past + new)
        for name in caches
    }
    return {"y": np.concatenate(y)} | rows


def _borders(inputs: dict[str, np.ndarray], past: int, new: int) -> list[int]:
    """How many tokens of a call of one sequence may come first, for none of them sees what follows."""
    own = past + 1 + np.arange(new)
    end = np.clip(inputs.get("visible_end", own), own, past + new)
    return [cut for cut in range(1, new) if end[:cut].max() <= past + cut]


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from([0, 3, 200, 250, 500]), st.integers(1, 70), st.integers(0, 2**32))
def test_a_row_has_the_same_bits_alone_token_by_token_and_in_any_mixture(
    case: Case, past: int, new: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    case = replace(case, sequences=((past, new),))
    whole = make_inputs(case, rng)
    whole_images = _borders(whole, past, new)
    cuts = [cut for cut in sorted(set(rng.integers(1, new + 1, 3).tolist())) if cut in whole_images]
    expected = in_steps(case, rng, whole, [], True)
    ways = {
        "token by token": in_steps(case, rng, whole, whole_images, True),
        "in chunks": in_steps(case, rng, whole, cuts, True),
        "among others": in_steps(case, rng, whole, [], False),
        "in chunks among others": in_steps(case, rng, whole, cuts, False),
    }
    for way, found in ways.items():
        for name, array in expected.items():
            np.testing.assert_array_equal(bits(found[name]), bits(array), err_msg=f"{way}: {name}")


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("new", [1, 7, 200])
def test_threads_do_not_change_a_bit(new: int, dtype: str, rng: np.random.Generator) -> None:
    case = Case(((900, new), (30, 2)), key_dim=64, value_dim=64, dtype=dtype)
    inputs = make_inputs(case, rng)
    found = run(case, inputs)
    for threads in (1, 3):
        for name, array in run(replace(case, threads=threads), inputs).items():
            np.testing.assert_array_equal(bits(array), bits(found[name]))


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("new", [1, 64])
@pytest.mark.parametrize("case", [Case(), MLA], ids=["value_cache", "value_in_key"])
def test_caches_bound_to_themselves_are_updated_in_place(
    case: Case, new: int, dtype: str, rng: np.random.Generator
) -> None:
    case = replace(case, sequences=((300, new), (20, 1)), dtype=dtype)
    inputs = make_inputs(case, rng)
    binding = session(case).io_binding()
    caches = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items() if "cache" in name}
    for name, array in inputs.items():
        if name in caches:
            binding.bind_ortvalue_input(name, caches[name])
            binding.bind_ortvalue_output(f"{name}_out", caches[name])
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    session(case).run_with_iobinding(binding)
    updated = {"y": binding.get_outputs()[-1].numpy()}
    updated |= {f"{name}_out": value.numpy() for name, value in caches.items()}
    check(case, inputs, updated)
    for name, copied in run(case, inputs).items():
        np.testing.assert_array_equal(bits(updated[name]), bits(copied))


def test_pages_before_the_window_may_be_gone(rng: np.random.Generator) -> None:
    case = Case(((300, 5),), window=60)
    inputs = make_inputs(case, rng)
    expected = run(case, inputs)["y"]
    inputs["page_table"][0, :3] = -1
    np.testing.assert_array_equal(run(case, inputs)["y"], expected)
    inputs["page_table"][0, 3] = -1  # of entry 241, which the first token still sees
    with pytest.raises(Exception, match=r"page_table\[0, 3\] = -1"):
        run(case, inputs)


def test_pages_before_the_chunk_may_be_gone(rng: np.random.Generator) -> None:
    case = Case(((300, 5),), chunk=150)
    inputs = make_inputs(case, rng)
    expected = run(case, inputs)["y"]
    inputs["page_table"][0, :4] = -1
    np.testing.assert_array_equal(run(case, inputs)["y"], expected)
    inputs["page_table"][0, 4] = -1
    with pytest.raises(Exception, match=r"page_table\[0, 4\] = -1"):
        run(case, inputs)


def test_large_scores_do_not_overflow(rng: np.random.Generator) -> None:
    case = Case(((500, 1), (300, 40)), key_dim=64, value_dim=64, rotary_dim=0)
    inputs = make_inputs(case, rng)
    inputs["qkv"] *= 30
    check(case, inputs, run(case, inputs), tolerance=1e-3)  # scores of a thousand, in float32


def test_zeros_are_quantized_to_zeros(rng: np.random.Generator) -> None:
    case = Case(dtype="int8")
    inputs = make_inputs(case, rng)
    inputs["qkv"][:] = 0
    outputs = run(case, inputs)
    assert np.isfinite(outputs["y"]).all()
    assert not sequence_rows(to_rows(outputs["key_cache_out"], True), inputs["page_table"][0], 11)[10].any()


@pytest.mark.parametrize("sequences", [(), ((10, 0), (0, 0))], ids=["no sequences", "empty sequences"])
def test_no_tokens_leave_the_caches_as_they_are(sequences: tuple, rng: np.random.Generator) -> None:
    case = Case(sequences)
    inputs = make_inputs(case, rng)
    outputs = run(case, inputs)
    assert outputs["y"].shape == (0, 4 * 32)
    for name in ("key_cache", "value_cache"):
        np.testing.assert_array_equal(bits(outputs[f"{name}_out"]), bits(inputs[name]))


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("new", [1, 40])
def test_nan_or_infinity_in_a_token_leaves_other_sequences_and_earlier_tokens_alone(
    new: int, value: float, dtype: str, rng: np.random.Generator
) -> None:
    case = Case(((150, new), (150, new)), dtype=dtype)
    inputs = make_inputs(case, rng)
    expected = run(case, inputs)["y"]
    bad = new // 2
    for name in ("qkv", "cos"):
        changed = inputs | {name: inputs[name].copy()}
        changed[name][bad, ::7] = value
        y = run(case, changed)["y"]
        np.testing.assert_array_equal(bits(y[:bad]), bits(expected[:bad]))
        np.testing.assert_array_equal(bits(y[new:]), bits(expected[new:]))
        assert np.isnan(value) <= np.isnan(y[bad:new]).all()
    for name in ("key_cache", "value_cache"):
        changed = inputs | {name: inputs[name].copy()}
        page = changed[name][inputs["page_table"][0, 0]].reshape(case.kv_heads, -1)
        (page.view(np.float32) if dtype == "int8" else page)[:, ::7] = value
        y = run(case, changed)["y"]
        np.testing.assert_array_equal(bits(y[new:]), bits(expected[new:]))
        assert np.isnan(value) <= np.isnan(y[:new]).any(axis=1).all()


F32, I32 = np.float32, np.int32
BAD_INPUTS = {
    "context_len": [
        (np.array([-1, 0], I32), "context_len[0] = -1 (allowed: 0 to 1073741822)"),
        (np.array([1, 2**31 - 1], I32), "context_len[1] = 2147483647 (allowed: 0 to 1073741824)"),
        (np.array([128, 0], I32), "page_table has 2 pages a sequence (allowed: 3 or more, for the 130 tokens of seq"),
        (np.zeros(3, I32), "query_start has shape [3] (allowed: [4], [N + 1] for context_len [N])"),
    ],
    "query_start": [
        (np.array([1, 2, 2], I32), "query_start[0] = 1 (allowed: 0)"),
        (np.array([0, 3, 2], I32), "query_start[2] = 2 (allowed: 3 or more)"),
        (np.array([0, 1, 1], I32), "query_start[2] = 1 (allowed: 2, the rows of qkv)"),
    ],
    "page_table": [
        (np.array([[4, 0], [0, 0]], I32), "page_table[0, 0] = 4 (allowed: 0 to 3)"),
        (np.array([[-1, 0], [0, 0]], I32), "page_table[0, 0] = -1 (allowed: 0 to 3)"),
        (np.zeros((1, 2), I32), "page_table has shape [1, 2] (allowed: [2, pages of a sequence])"),
        (np.zeros((2, 0), I32), "page_table has 0 pages a sequence (allowed: 1 or more, for the 12 tokens of seq"),
    ],
    "qkv": [
        (np.zeros((2, 100), F32), "qkv has shape [2, 100] (allowed: [2, 256], [T, (heads + kv_heads) * key_dim + kv"),
        (np.zeros((3, 256), F32), "cos has shape [2, 16] (allowed: [3, 16], [T, rotary_dim / 2])"),
        (np.zeros((2**40, 0), F32), "qkv has shape [1099511627776, 0] (allowed: up to 2147483647 rows)"),
    ],
    "cos": [(np.zeros((2, 8), F32), "cos has shape [2, 8] (allowed: [2, 16], [T, rotary_dim / 2])")],
    "sin": [(np.zeros((1, 16), F32), "sin has shape [1, 16] (allowed: [2, 16], [T, rotary_dim / 2])")],
    "key_cache": [
        (np.zeros((4, 2, 60, 32), F32), "key_cache has shape [4, 2, 60, 32] (allowed for float32: [pages, 2, page, k"),
        (np.zeros((4, 3, 64, 32), F32), "key_cache has shape [4, 3, 64, 32] (allowed for"),
        (np.zeros((4, 2, 0, 32), F32), "key_cache has shape [4, 2, 0, 32] (allowed for"),
        (np.zeros((4, 2, 64, 33), F32), "key_cache has shape [4, 2, 64, 33] (allowed for"),
        (np.zeros((4, 2, 64, 578), F32), "key_cache has shape [4, 2, 64, 578] (allowed for"),
        (
            np.zeros((1, 2, 64, 64), F32),
            "value_cache has shape [4, 2, 64, 32] (allowed for float32: [1, 2, 64, value_d",
        ),
    ],
    "value_cache": [
        (
            np.zeros((4, 2, 80, 32), F32),
            "value_cache has shape [4, 2, 80, 32] (allowed for float32: [4, 2, 64, value_d",
        ),
        (np.zeros((4, 2, 64, 514), F32), "value_cache has shape [4, 2, 64, 514] (allowed for"),
    ],
    "q_norm": [(np.zeros(16, F32), "q_norm has shape [16] (allowed: [32], [key_dim])")],
    "k_norm": [(np.zeros(16, F32), "k_norm has shape [16] (allowed: [32], [key_dim])")],
    "sinks": [(np.zeros(2, F32), "sinks has shape [2] (allowed: [4], [heads])")],
    "visible_end": [(np.zeros(3, I32), "visible_end has shape [3] (allowed: [2], [T])")],
}


@pytest.mark.parametrize(
    ("name", "value", "message"), [(name, *bad) for name, cases in BAD_INPUTS.items() for bad in cases]
)
def test_bad_input_is_refused_by_name(name: str, value: np.ndarray, message: str, rng: np.random.Generator) -> None:
    case = Case(((10, 2), (0, 0)), norm=True, sinks=True, images=True)
    inputs = make_inputs(case, rng)
    assert inputs["key_cache"].shape == (4, 2, 64, 32)
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as caught:
        run(case, inputs | {name: value})
    assert f"PagedAttention: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"heads": 0}, "heads = 0 (allowed: 1 to 1024)"),
        ({"heads": 2**61, "kv_heads": 2**61}, f"heads = {2**61} (allowed: 1 to 1024)"),
        ({"kv_heads": 3}, "kv_heads = 3 with heads = 4 (allowed: a divisor of heads)"),
        ({"kv_heads": 0}, "kv_heads = 0 (allowed: 1 to 4)"),
        ({"rotary_dim": 7}, "rotary_dim = 7 (allowed: even)"),
        ({"rotary_dim": -2}, "rotary_dim = -2 (allowed: 0 to 576)"),
        ({"rotary_start": -1}, "rotary_start = -1 (allowed: 0 to 576)"),
        ({"window": -1}, "window = -1 (allowed: 0 to 1073741824)"),
        ({"chunk": -1}, "chunk = -1 (allowed: 0 to 1073741824)"),
        ({"epsilon": -1.0}, "epsilon = -1 (allowed: 0 or more)"),
        ({"scale": float("nan")}, "scale = nan (allowed: 0 or more)"),
        ({"softcap": float("inf")}, "softcap = inf (allowed: 0 or more)"),
        ({"value_in_key": 2}, "value_in_key = 2 (allowed: 0 to 1)"),
        ({"value_in_key": 1, "value_dim": 8, "value_norm": 1}, "value_norm = 1 (allowed: 0 to 0)"),
        ({"value_in_key": 1, "value_dim": 0}, "value_dim = 0 with value_in_key (allowed: even, 2 to 512)"),
        ({"rotary_dim": "all"}, "attribute rotary_dim is missing (an integer)"),
    ],
)
def test_bad_attribute_is_refused_by_name(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception) as caught:
        session(Case(), **attributes)
    assert f"PagedAttention: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("case", "attributes", "without", "message"),
    [
        (Case(), {"rotary_start": 2}, "", "rotary_start + rotary_dim = 34 (allowed: up to the 32 dimensions of a key)"),
        (
            Case(),
            {"value_in_key": 1, "value_dim": 32},
            "",
            "value_cache is given (allowed with value_in_key = 1: none)",
        ),
        (Case(), {}, "value_cache", "value_cache is missing (allowed with value_in_key = 0: [pages, kv_heads, page, v"),
        (Case(), {}, "cos", "cos is missing (allowed with rotary_dim = 32: [T, rotary_dim / 2])"),
        (Case(), {"rotary_dim": 0}, "cos", "sin is given (allowed with rotary_dim = 0: none)"),
        (Case(norm=True), {}, "k_norm", "k_norm is missing (allowed: both norms, or none)"),
        (Case(norm=True), {}, "q_norm", "q_norm is missing (allowed: both norms, or none)"),
        (MLA, {"value_dim": 98}, "", "value_dim = 98 (allowed: up to key_dim, 96)"),
        (
            Case(value_dim=16),
            {"value_is_key": 1},
            "",
            "value_cache has shape [4, 2, 64, 16] (allowed with value_is_key: that of key_cache, [4, 2, 64, 32])",
        ),
    ],
)
def test_attributes_and_inputs_that_do_not_fit_are_refused(
    case: Case, attributes: dict[str, Any], without: str, message: str, rng: np.random.Generator
) -> None:
    inputs = {name: array for name, array in make_inputs(case, rng).items() if name != without}
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as caught:
        session(case, without, **attributes).run(None, inputs)
    assert f"PagedAttention: {message}" in str(caught.value)


@pytest.mark.parametrize("missing", [name for name in INPUTS if name not in OPTIONAL])
def test_an_input_that_is_left_out_is_refused(missing: str) -> None:
    with pytest.raises(Exception, match=r"is marked single but has an empty string"):
        session(Case(), without=missing)


def test_limits_are_those_that_export_is_told(rng: np.random.Generator) -> None:
    case = Case(key_dim=cpu_limits.KEY_DIM, value_dim=cpu_limits.VALUE_DIM, heads=cpu_limits.HEADS, rotary_dim=0)
    run(case, make_inputs(case, rng))
    with pytest.raises(Exception, match=rf"allowed: 1 to {cpu_limits.HEADS}\)"):
        session(case, heads=cpu_limits.HEADS + 1)
    for name, wider in (
        ("key_dim", replace(case, key_dim=case.key_dim + 2)),
        ("value_dim", replace(case, value_dim=case.value_dim + 2)),
    ):
        with pytest.raises(Exception, match=rf"{name} even, 2 to {getattr(case, name)}"):
            run(wider, make_inputs(wider, rng))
