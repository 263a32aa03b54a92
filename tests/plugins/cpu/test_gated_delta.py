"""moevlm.cpu::GatedDelta against the numpy spec, and its bits against themselves in other company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from moevlm.plugins.cpu import limits
from moevlm.plugins.ops.spec import GatedDeltaSpec
from tests.support.cpu_gated_delta import OUTPUTS, STATES, check, packed, run, session
from tests.support.delta_variants import DELTAS, ROWS, STEPS, delta_inputs

# Heads that no vector divides, but two floats; that a narrow one divides; and as the published models have them.
SIZES = [(8, 8), (24, 40), (10, 6), (12, 20), (128, 64), (256, 256)]
TOKENS = ("qkv", "a", "b")
Array = np.ndarray


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("variant", DELTAS)
def test_agrees_with_the_spec(variant: str, step: str) -> None:
    inputs = delta_inputs(DELTAS[variant], STEPS[step])
    check(DELTAS[variant], inputs, run(DELTAS[variant], inputs))


@pytest.mark.parametrize(("key_dim", "value_dim"), SIZES)
@pytest.mark.parametrize("kernel", [2, 4, 16])
def test_head_sizes_and_kernels(key_dim: int, value_dim: int, kernel: int) -> None:
    spec = GatedDeltaSpec(key_heads=1, value_heads=2, key_dim=key_dim, value_dim=value_dim, kernel=kernel)
    inputs = delta_inputs(spec, (3, 1, 9))
    check(spec, inputs, run(spec, inputs))


def test_the_geometry_of_qwen3_5() -> None:
    spec = GatedDeltaSpec(key_heads=16, value_heads=32, key_dim=128, value_dim=128, kernel=4)
    inputs = delta_inputs(spec, (1, 20, 1))
    check(spec, inputs, run(spec, inputs))


def in_steps(
    spec: GatedDeltaSpec, whole: dict[str, Array], cuts: list[int], rng: np.random.Generator, alone: bool
) -> dict[str, Array]:
    """The tokens of `whole`, a call of one sequence, in calls cut at `cuts`, each among other sequences unless alone.

    Returns y of these tokens, and the sequence's rows at the end.
    """
    ours, y = int(whole["state_row"][0]), []
    kept = {name: whole[name][ours] for name in STATES}
    for begin, end in zip([0, *cuts], [*cuts, len(whole["qkv"])], strict=True):
        before, behind = ([], []) if alone else rng.integers(0, 80, (2, 2)).tolist()
        step = delta_inputs(spec, (*before, end - begin, *behind), int(rng.integers(2**31)))
        mine = len(before)
        first, last = step["query_start"][mine : mine + 2]
        step |= {name: whole[name] for name in ("conv_weight", "rate", "dt_bias")}
        for name in TOKENS:
            step[name][first:last] = whole[name][begin:end]
        row = int(step["state_row"][mine])
        for name in STATES:
            step[name][row] = kept[name]
        outputs = run(spec, step, threads=int(rng.integers(1, 4)))
        y.append(outputs["y"][first:last])
        kept = {name: outputs[f"{name}_out"][row] for name in STATES}
    return {"y": np.concatenate(y)} | kept


@pytest.mark.parametrize("variant", DELTAS)
def test_a_token_has_the_same_bits_alone_token_by_token_and_in_any_mixture(variant: str) -> None:
    spec, rng = DELTAS[variant], np.random.default_rng(7)
    whole = delta_inputs(spec, (150,))
    expected = in_steps(spec, whole, [], rng, True)
    ways = {
        "token by token": (list(range(1, 150)), True),
        "in chunks": ([2, 3, 24, 64, 100], True),
        "among others": ([], False),
        "in chunks among others": ([1, 65, 66, 128], False),
    }
    for way, (cuts, alone) in ways.items():
        for name, array in in_steps(spec, whole, cuts, rng, alone).items():
            np.testing.assert_array_equal(
                array.view(np.uint32), expected[name].view(np.uint32), err_msg=f"{way}: {name}"
            )


@pytest.mark.parametrize("step", STEPS)
def test_threads_do_not_change_a_bit(step: str) -> None:
    """With many, the columns of a head are divided among them."""
    spec = GatedDeltaSpec(key_heads=1, value_heads=1, key_dim=128, value_dim=128, kernel=4)
    inputs = delta_inputs(spec, STEPS[step])
    expected = run(spec, inputs, threads=1)
    for threads in (2, 7):
        for name, array in run(spec, inputs, threads).items():
            np.testing.assert_array_equal(array.view(np.uint32), expected[name].view(np.uint32))


@pytest.mark.parametrize("step", STEPS)
def test_states_bound_to_themselves_are_updated_in_place(step: str) -> None:
    spec = DELTAS["shared_keys"]
    inputs = delta_inputs(spec, STEPS[step])
    expected, running = run(spec, inputs), session(spec)
    binding = running.io_binding()
    states = {name: ort.OrtValue.ortvalue_from_numpy(inputs[name].copy()) for name in STATES}
    for name, array in packed(inputs).items():
        if name in STATES:
            binding.bind_ortvalue_input(name, states[name])
            binding.bind_ortvalue_output(f"{name}_out", states[name])
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    running.run_with_iobinding(binding)
    found = {f"{name}_out": value.numpy() for name, value in states.items()}
    found["y"] = binding.get_outputs()[-1].numpy()
    for name in OUTPUTS:
        np.testing.assert_array_equal(found[name], expected[name])


def test_strong_and_weak_decays_over_a_long_prompt() -> None:
    """What a token leaves of the state reaches from nothing to all of it; keys repeat, so that a state fills up."""
    spec = GatedDeltaSpec(key_heads=1, value_heads=4, key_dim=32, value_dim=16, kernel=4)
    inputs = delta_inputs(spec, (700,))
    inputs["rate"] = np.array([1e-4, 1e-2, 1, 100], np.float32)
    inputs["a"] *= 5
    inputs["qkv"][100:200] = inputs["qkv"][99]
    check(spec, inputs, run(spec, inputs))


def test_no_tokens_leave_the_states_as_they_are() -> None:
    for lengths in ((), (0, 0)):
        inputs = delta_inputs(DELTAS["plain"], lengths)
        outputs = run(DELTAS["plain"], inputs)
        assert outputs["y"].shape == (0, 32)
        for name in STATES:
            np.testing.assert_array_equal(outputs[f"{name}_out"], inputs[name])


def test_sequences_without_tokens_may_point_at_any_row_and_keep_it() -> None:
    spec, lengths = DELTAS["plain"], (0, 3, 0, 1)
    inputs = delta_inputs(spec, lengths)
    inputs["state_row"] = np.array([0, 2, 2, 0], np.int32)
    outputs = run(spec, inputs)
    inputs["state_row"][[0, 2]] = [5, 6]
    check(spec, inputs, outputs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("name", ["qkv", "a", "b", "delta_state"])
def test_nan_or_infinity_leaves_other_sequences_and_earlier_tokens_alone(name: str, value: float) -> None:
    spec = DELTAS["shared_keys"]
    inputs = delta_inputs(spec, (40, 40))
    expected = run(spec, inputs)
    changed = inputs | {name: inputs[name].copy()}
    bad = 20 if name in TOKENS else 0
    place = bad if name in TOKENS else inputs["state_row"][0]
    changed[name][place, ..., ::7] = value
    outputs = run(spec, changed)
    np.testing.assert_array_equal(outputs["y"][:bad], expected["y"][:bad])
    np.testing.assert_array_equal(outputs["y"][40:], expected["y"][40:])
    row = inputs["state_row"][1]
    for state in STATES:
        np.testing.assert_array_equal(outputs[f"{state}_out"][row], expected[f"{state}_out"][row])
    assert np.isnan(value) <= np.isnan(outputs["y"][bad:40]).any(axis=1).all()


F32, I32 = np.float32, np.int32
BAD_INPUTS = {
    "qkv": [
        (np.zeros((3, 95), F32), "qkv has shape [3, 95] (allowed: [3, 96], [T, 2 * key_heads * key_dim + value_heads"),
        (np.zeros((2, 96), F32), "a has shape [3, 2] (allowed: [2, 2], [T, value_heads])"),
        (np.zeros((2**40, 0), F32), "qkv has shape [1099511627776, 0] (allowed: up to 2147483647 rows)"),
    ],
    "a": [(np.zeros((3, 1), F32), "a has shape [3, 1] (allowed: [3, 2], [T, value_heads])")],
    "b": [(np.zeros((4, 2), F32), "b has shape [4, 2] (allowed: [3, 2], [T, value_heads])")],
    "conv_weight": [(np.zeros((96, 4), F32), "conv_weight has shape [96, 4] (allowed: [4, 96], [kernel, the columns")],
    "rate": [(np.zeros(3, F32), "rate has shape [3] (allowed: [2], [value_heads])")],
    "dt_bias": [(np.zeros(1, F32), "dt_bias has shape [1] (allowed: [2], [value_heads])")],
    "conv_state": [
        (np.zeros((ROWS, 4, 96), F32), "conv_state has shape [7, 4, 96] (allowed: [7, 3, 96], [rows, kernel - 1, the"),
        (np.zeros((6, 3, 96), F32), "conv_state has shape [6, 3, 96] (allowed: [7, 3, 96], [rows, kernel - 1, the"),
    ],
    "delta_state": [
        (np.zeros((ROWS, 2, 16, 8), F32), "delta_state has shape [7, 2, 16, 8] (allowed: [7, 2, 16, 16], [rows, value"),
        (np.zeros((2**40, 0, 16, 16), F32), "delta_state has shape [1099511627776, 0, 16, 16] (allowed: up to"),
        (np.zeros((0, 2, 16, 16), F32), "conv_state has shape [7, 3, 96] (allowed: [0, 3, 96], [rows, kernel - 1"),
    ],
    "query_start": [
        (np.array([1, 2, 3], I32), "query_start[0] = 1 (allowed: 0)"),
        (np.array([0, 3, 2], I32), "query_start[2] = 2 (allowed: 3 or more)"),
        (np.array([0, 1, 2], I32), "query_start[2] = 2 (allowed: 3, the rows of qkv)"),
        (np.array([0, 3], I32), "query_start has shape [2] (allowed: [3], [N + 1] for state_row [N])"),
    ],
    "state_row": [
        (np.array([1, 7], I32), "state_row[1] = 7 (allowed: 0 to 6)"),
        (np.array([-1, 1], I32), "state_row[0] = -1 (allowed: 0 to 6)"),
        (np.array([3, 3], I32), "state_row has 3 twice (allowed: a row for each sequence with tokens)"),
    ],
}


@pytest.mark.parametrize(
    ("name", "value", "message"), [(name, *bad) for name, cases in BAD_INPUTS.items() for bad in cases]
)
def test_bad_input_is_refused_by_name(name: str, value: Array, message: str) -> None:
    inputs = packed(delta_inputs(DELTAS["plain"], (2, 1)))
    given = {key: value if key == name else array for key, array in inputs.items()}
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as caught:
        session(DELTAS["plain"]).run(None, given)
    assert f"GatedDelta: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"key_heads": 0}, "key_heads = 0 (allowed: 1 to 1024)"),
        ({"value_heads": 2**61}, f"value_heads = {2**61} (allowed: 1 to 1024)"),
        ({"value_heads": 3}, "key_heads = 2 with value_heads = 3 (allowed: a divisor of value_heads)"),
        ({"key_dim": 258}, "key_dim = 258 (allowed: 2 to 256)"),
        ({"value_dim": 7}, "value_dim = 7 (allowed: even)"),
        ({"kernel": 1}, "kernel = 1 (allowed: 2 to 16)"),
        ({"kernel": 17}, "kernel = 17 (allowed: 2 to 16)"),
        ({"scale": -1.0}, "scale = -1 (allowed: 0 or more)"),
        ({"epsilon": float("nan")}, "epsilon = nan (allowed: 0 or more)"),
        ({"kernel": "all"}, "attribute kernel is missing (an integer)"),
    ],
)
def test_bad_attribute_is_refused_by_name(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception) as caught:
        session(DELTAS["plain"], **attributes)
    assert f"GatedDelta: {message}" in str(caught.value)


def test_limits_are_those_that_export_is_told() -> None:
    spec = GatedDeltaSpec(1, 1, limits.DELTA_DIM, limits.DELTA_DIM, limits.CONVOLUTION)
    run(spec, delta_inputs(spec, (2,)))
    for name in ("key_dim", "value_dim"):
        with pytest.raises(Exception, match=rf"{name} = \d+ \(allowed: 2 to {limits.DELTA_DIM}\)"):
            session(replace(spec, **{name: limits.DELTA_DIM + 2}))
    with pytest.raises(Exception, match=rf"\(allowed: 2 to {limits.CONVOLUTION}\)"):
        session(replace(spec, kernel=limits.CONVOLUTION + 1))
