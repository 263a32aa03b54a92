"""The experts kernels, interpreted, against the numpy spec on the weights as they are stored."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.gpu.cases.stored_weights import meant_weight, stored_weight
from bench.variants import BLOCKS, expert_weights, hidden_states
from moevlm.export.formats.base import rounded
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.projection import FORMATS
from moevlm.plugins.gpu.program import Launch
from moevlm.plugins.gpu.tiles import FAMILIES, Range, tiles
from moevlm.plugins.ops.experts import experts as reference_experts
from moevlm.plugins.ops.spec import ExpertsSpec
from moevlm.runtime.core.dtypes import E4M3
from tests.plugins.gpu.interpreter import Interpreter

# Relative Frobenius norm. Interpreted bfloat16 is cut off, not rounded.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
STORED = [("", 32), ("int8", 32), ("int8", 128), ("int4", 32), ("int4", 128), ("fp8", 32), ("fp8", 128)]
STORED += [("fp4", 32), ("fp4", 128)]
SILU = ExpertsSpec()
SMS = sorted(FAMILIES)


def draw_inputs(op: ExpertsOp, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """All inputs of `op` as float32 that its dtypes hold exactly, and the weights as they are stored."""
    rng = np.random.default_rng(seed)
    weights = expert_weights(op.spec, op.has_biases, op.hidden, op.inner, op.experts, seed)
    weights["down"] *= op.inner**-0.5
    inputs = {
        "x": rounded(hidden_states(tokens, op.hidden, seed), op.dtype),
        "expert_index": np.argsort(rng.random((tokens, op.experts)), 1)[:, : op.top_k].astype(np.int32),
        "expert_weight": rng.random((tokens, op.top_k), np.float32),
    }
    for name, values in weights.items():
        if op.weights and values.ndim == 3:
            inputs |= stored_weight(op, name, values, seed)
        else:
            inputs[name] = rounded(values, op.dtype)
    return inputs


def expected(op: ExpertsOp, inputs: dict[str, np.ndarray]) -> np.ndarray:
    weights = {}
    for name, width in (("gate_up", op.hidden), ("down", op.inner)):
        weights[name] = inputs[name]
        if op.weights:
            weights[name] = meant_weight(op, name, inputs, width)
        if op.has_biases:
            weights[f"{name}_bias"] = inputs[f"{name}_bias"]
    weights = {name: values.astype(np.float64) for name, values in weights.items()}
    routing = inputs["expert_index"], inputs["expert_weight"]
    return reference_experts(inputs["x"].astype(np.float64), *routing, spec=op.spec, **weights)


def agrees(interpreter: Interpreter, op: ExpertsOp, tokens: int, sm: int = 80, seed: int | None = None) -> None:
    inputs = draw_inputs(op, tokens, np.random.randint(1 << 30) if seed is None else seed)
    (y,) = interpreter.run(op.draft(sm), inputs)
    want = expected(op, inputs)
    assert np.linalg.norm(y - want) <= TOLERANCES[op.dtype] * np.linalg.norm(want)


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("has_biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_variant_agrees_with_the_spec(
    triton_interpreter: Interpreter, name: str, has_biases: bool, tokens: int
) -> None:
    op = ExpertsOp(BLOCKS[name], 4, 2, hidden=20, inner=12, dtype="float32", has_biases=has_biases)
    agrees(triton_interpreter, op, tokens)


@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [("float16", 1), ("float16", 5), ("float16", 33), ("bfloat16", 2), ("bfloat16", 9), ("float32", 9)],
)
@pytest.mark.parametrize(("weights", "group_size"), STORED)
def test_every_format_of_weights_agrees_with_the_spec(
    triton_interpreter: Interpreter, weights: str, group_size: int, dtype: str, tokens: int
) -> None:
    op = ExpertsOp(
        SILU,
        3,
        2,
        hidden=group_size + 8,
        inner=24,
        dtype=dtype,
        weights=weights,
        group_size=group_size,
        has_biases=True,
    )
    agrees(triton_interpreter, op, tokens)


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize(
    ("weights", "group_size", "dtype", "scales", "zeros"),
    [
        ("int4", 32, "bfloat16", "", True),
        ("int4", 128, "float16", "", True),
        ("int4", 32, "bfloat16", "float16", False),
        ("int4", 128, "bfloat16", "float16", True),
        ("int4", 32, "float16", "float32", True),
        ("int4", 32, "float32", "float16", True),
        ("int8", 32, "bfloat16", "float16", False),
        ("fp8", 128, "bfloat16", "float32", False),
        ("fp8", 32, "float16", "float32", False),
        ("fp4", 16, "bfloat16", E4M3, False),
        ("fp4", 16, "float16", E4M3, False),
        ("fp4", 16, "float32", E4M3, False),
    ],
)
def test_zeros_and_scales_of_their_own_precision_agree_with_the_spec(
    triton_interpreter: Interpreter,
    weights: str,
    group_size: int,
    dtype: str,
    scales: str,
    zeros: bool,
    tokens: int,
) -> None:
    hidden = 176 if scales == E4M3 else group_size + 8  # of NVFP4 three words of scales a row, the last one short
    op = ExpertsOp(SILU, 3, 2, hidden, 24, dtype, weights, group_size, scales=scales, zeros=zeros)
    agrees(triton_interpreter, op, tokens)


@pytest.mark.parametrize("tokens", [2, 8, 9, 33, 70, 180])
def test_a_few_tokens_and_many(triton_interpreter: Interpreter, tokens: int) -> None:
    op = ExpertsOp(SILU, 6, 3, hidden=32, inner=16, dtype="float16")
    agrees(triton_interpreter, op, tokens)


def every_tile() -> Iterator[tuple[int, str, Range, int]]:
    """(sm, weights, tiles, tokens) for one expert: each pair of tiles and each format once, and what chooses them."""
    seen = set()
    for sm, weights in product(sorted(FAMILIES), FORMATS):
        low = 0
        for chosen in tiles(one_expert(weights), sm):
            tokens = low + 1 if chosen.max_tokens is None else chosen.max_tokens
            low = tokens
            key = (weights, chosen.gate_up, chosen.down, tokens == 1)
            if key not in seen:
                seen.add(key)
                yield sm, weights, chosen, tokens


def one_expert(weights: str) -> ExpertsOp:
    return ExpertsOp(SILU, 1, 1, hidden=40, inner=24, dtype="float16", weights=weights)


@pytest.mark.parametrize(("sm", "weights", "chosen", "tokens"), list(every_tile()))
def test_every_tile_agrees_with_the_spec(
    triton_interpreter: Interpreter, sm: int, weights: str, chosen: Range, tokens: int
) -> None:
    made = one_expert(weights).draft(sm)
    last = next(v for v in made.variants if tokens <= v.max_tokens).steps[-2:]
    used = [dict(made.kernels[step.kernel].constants).get("TILE") for step in last if isinstance(step, Launch)]
    assert chosen.down in used
    agrees(triton_interpreter, one_expert(weights), tokens, sm)


def test_several_steps_of_which_the_last_is_short(triton_interpreter: Interpreter) -> None:
    op = ExpertsOp(SILU, 2, 1, hidden=300, inner=150, dtype="float16", weights="int4", group_size=128)
    for tokens in (1, 2):
        agrees(triton_interpreter, op, tokens)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape(triton_interpreter: Interpreter, data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 9))
    weights, group_size = data.draw(st.sampled_from(STORED))
    hidden = data.draw(st.integers(1, 200))
    # One sum alone may be near 0, where rounding its terms is large beside it: of several not all are.
    tokens = data.draw(st.sampled_from((1, 2, 7, 8, 9, 20) if hidden > 4 else (7, 8, 9, 20)))
    op = ExpertsOp(
        BLOCKS[data.draw(st.sampled_from(sorted(BLOCKS)))],
        experts,
        data.draw(st.integers(1, experts)),
        hidden,
        inner=data.draw(st.integers(1, 200)),
        dtype=data.draw(st.sampled_from(("float16", "float32"))),
        weights=weights,
        group_size=group_size,
        has_biases=data.draw(st.booleans()),
    )
    sm, seed = data.draw(st.sampled_from(SMS)), data.draw(st.integers(0, 1 << 30))
    agrees(triton_interpreter, op, tokens, sm, seed)


def test_the_order_of_rows_does_not_change_the_numbers(triton_interpreter: Interpreter) -> None:
    op = ExpertsOp(SILU, 5, 2, hidden=32, inner=16, dtype="float16")
    inputs, order = draw_inputs(op, 30, seed=0), np.random.default_rng(0).permutation(30)
    moved = {name: inputs[name][order] for name in ("x", "expert_index", "expert_weight")}
    (y,), (z,) = (triton_interpreter.run(op.draft(80), given) for given in (inputs, inputs | moved))
    # To a place of float16: in the interpreter, a row's place in a tile may change how numpy's product rounds.
    np.testing.assert_allclose(z, y[order], rtol=2**-9, atol=2**-12)


@pytest.mark.parametrize("weights", ["", "int4"])
@pytest.mark.parametrize("tokens", [1, 6, 20, 180])
def test_an_index_of_any_content_reads_and_writes_nothing_out_of_bounds(
    triton_interpreter: Interpreter, tokens: int, weights: str
) -> None:
    op = ExpertsOp(SILU, 5, 3, hidden=40, inner=24, dtype="float16", weights=weights, has_biases=True)
    inputs = draw_inputs(op, tokens, np.random.randint(1 << 30))
    wrong = np.random.randint(-(1 << 31), 1 << 31, (tokens, 3)).astype(np.int32)
    wrong[:, 1] = np.random.choice([-1, 5, 6, np.iinfo(np.int32).max, np.iinfo(np.int32).min], tokens)
    (y,) = triton_interpreter.run(op.draft(80), inputs | {"expert_index": wrong})
    assert y.shape == (tokens, op.hidden)


def test_the_nearest_expert_takes_an_index_that_names_none(triton_interpreter: Interpreter) -> None:
    op = ExpertsOp(SILU, 5, 1, hidden=40, inner=24, dtype="float16")
    for tokens in (1, 6, 20):
        inputs = draw_inputs(op, tokens, np.random.randint(1 << 30))
        wrong = np.random.choice([5, 1 << 30], (tokens, 1)).astype(np.int32)
        outputs = [
            triton_interpreter.run(op.draft(80), inputs | {"expert_index": index})[0]
            for index in (wrong, wrong.clip(0, 4))
        ]
        np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("has_biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("tokens", [1, 6, 20, 180])
def test_minus_one_is_no_expert_whose_weights_are_never_read(
    triton_interpreter: Interpreter, tokens: int, has_biases: bool
) -> None:
    """All choices of some tokens, some of others; weights of experts that nobody chose are not numbers."""
    op = ExpertsOp(SILU, 6, 3, hidden=40, inner=24, dtype="float32", has_biases=has_biases)
    inputs = draw_inputs(op, tokens, tokens)
    index = inputs["expert_index"].copy()
    index[np.random.default_rng(tokens).random(index.shape) < 0.4] = -1
    index[::2] = -1
    for chosen in (index, np.full_like(index, -1)):
        given = inputs | {"expert_index": np.where(chosen == 3, -1, chosen).astype(np.int32)}
        want = expected(op, given)
        for name in ("gate_up", "down"):
            given[name] = given[name].copy()
            given[name][list({*range(6)} - {*given["expert_index"].ravel().tolist()})] = np.nan
        (y,) = triton_interpreter.run(op.draft(80), given)
        np.testing.assert_allclose(y, want, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_one_choice_of_a_lone_token_may_be_none(triton_interpreter: Interpreter, slot: int) -> None:
    op = ExpertsOp(SILU, 6, 3, hidden=40, inner=24, dtype="float32", has_biases=True)
    inputs = draw_inputs(op, 1, slot)
    inputs["expert_index"][0, slot] = -1
    (y,) = triton_interpreter.run(op.draft(80), inputs)
    np.testing.assert_allclose(y, expected(op, inputs), atol=1e-5)


def test_inputs_that_differ_from_the_draft_are_refused(triton_interpreter: Interpreter) -> None:
    op = ExpertsOp(SILU, 5, 2, hidden=32, inner=16, dtype="float16")
    inputs = draw_inputs(op, 3, 0)
    wrong = inputs | {"down": inputs["down"][:, :, :15]}
    with pytest.raises(ValueError, match=r"down has the shape \[5, 32, 15\] \(allowed: \[5, 32, 16\] "):
        triton_interpreter.run(op.draft(80), wrong)
    with pytest.raises(ValueError, match="no variant for T = 9"):
        triton_interpreter.run(op.draft(80, max_tokens=8), draw_inputs(op, 9, 0))
