"""GatedDelta's kernels, interpreted, against the numpy spec; memory that nobody wrote holds NaN."""

from dataclasses import replace

import numpy as np
import pytest

from bench.gated_delta import deviation, draw_inputs
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.gated_delta import GatedDeltaOp
from moevlm.plugins.gpu.program import chosen
from moevlm.plugins.gpu.tiles import FAMILIES
from moevlm.plugins.ops.spec import GatedDeltaSpec
from moevlm.runtime.core.errors import FieldError
from tests.plugins.gpu.interpreter import Interpreter
from tests.support.delta_variants import DELTAS, STEPS

FIRST_OF_FAMILY = [min(sm for sm in FAMILIES if FAMILIES[sm] == family) for family in sorted(set(FAMILIES.values()))]
# Relative Frobenius norm. Interpreted bfloat16 is cut off, not rounded.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
SMALL = GatedDeltaSpec(key_heads=1, value_heads=2, key_dim=16, value_dim=16, kernel=4)
QWEN = GatedDeltaSpec(key_heads=16, value_heads=32, key_dim=128, value_dim=128, kernel=4)


def agrees(interpreter: Interpreter, op: GatedDeltaOp, draft: Draft, inputs: dict[str, np.ndarray]) -> None:
    assert deviation(op, inputs, interpreter.run(draft, inputs)) <= TOLERANCES[op.dtype]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", DELTAS)
def test_every_variant_agrees_with_the_spec(triton_interpreter: Interpreter, name: str, step: str) -> None:
    op = GatedDeltaOp(DELTAS[name], "float32")
    agrees(triton_interpreter, op, op.draft(80), draw_inputs(op, STEPS[step], 0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_every_dtype_agrees_with_the_spec(triton_interpreter: Interpreter, step: str, dtype: str) -> None:
    op = GatedDeltaOp(SMALL, dtype)
    agrees(triton_interpreter, op, op.draft(90), draw_inputs(op, STEPS[step], 1))


def test_what_lies_beside_in_a_row_is_not_read(triton_interpreter: Interpreter) -> None:
    op = GatedDeltaOp(SMALL, "float32", beside=24)
    for step in ("decode", "mixed"):
        agrees(triton_interpreter, op, op.draft(80), draw_inputs(op, STEPS[step], 6))


@pytest.mark.parametrize("sm", FIRST_OF_FAMILY)
def test_tiles_of_every_gpu(triton_interpreter: Interpreter, sm: int) -> None:
    op = GatedDeltaOp(replace(SMALL, key_dim=128, value_dim=128), "float16")
    agrees(triton_interpreter, op, op.draft(sm), draw_inputs(op, (1, 50), 2))


def test_each_launch_plan_is_right_for_all_that_it_admits(triton_interpreter: Interpreter) -> None:
    op = GatedDeltaOp(SMALL, "float32")
    draft = op.draft(80)
    for lengths in STEPS["decode"], (2, 0, 0, 1):
        inputs = draw_inputs(op, lengths, 3)
        for variant in draft.variants:
            agrees(triton_interpreter, op, replace(draft, variants=(variant,)), inputs)


def test_sequences_of_row_0_are_computed_and_keep_nothing(triton_interpreter: Interpreter) -> None:
    op = GatedDeltaOp(SMALL, "float32")
    for lengths in (1, 1, 1, 1), (5, 1, 40, 1):
        agrees(triton_interpreter, op, op.draft(80), draw_inputs(op, lengths, 4, padding=2))


def test_a_chunk_of_equal_keys_without_decay_stays_exact(triton_interpreter: Interpreter) -> None:
    """Powers of its matrix of likenesses reach binomial coefficients, 10 ** 8 of 32."""
    op = GatedDeltaOp(SMALL, "float32")
    inputs = draw_inputs(op, (64,), 5)
    heads, keys = op.spec.value_heads, op.spec.key_heads * op.spec.key_dim
    inputs["x"][:, keys : 2 * keys] = 3
    inputs["x"][:, -2 * heads :] = np.repeat([-20, 20], heads)  # nothing is forgotten, all is taken up
    agrees(triton_interpreter, op, op.draft(80), inputs)


@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_made_up_inputs_touch_nothing_else(triton_interpreter: Interpreter, step: str) -> None:
    op = GatedDeltaOp(SMALL, "float16")
    inputs = draw_inputs(op, STEPS[step], 0)
    random = np.random.default_rng(0)
    extremes = np.array([-(1 << 31), -1, 0, 1, 17, 1 << 20, (1 << 31) - 1], np.int32)
    indices = ("query_start", "state_row")
    for names in (*((name,) for name in indices), *(indices,) * 5):
        made_up = {name: random.choice(extremes, inputs[name].shape) for name in names}
        triton_interpreter.run(op.draft(80), inputs | made_up)


def test_launches_by_the_sizes_of_a_step() -> None:
    draft = GatedDeltaOp(QWEN).draft(90)

    def launches(tokens: int, sequences: int) -> dict[str, tuple[int, ...]]:
        """Kernels in order, and their programs."""
        sizes = {"T": tokens, "N": sequences, "P": 65}
        steps = chosen(draft.variants, sizes).steps
        return {draft.kernels[step.kernel].function: tuple(count.at(sizes) for count in step.grid) for step in steps}

    assert launches(1, 1) == {"convolve": (1, 64, 1), "delta_recurrent": (1, 32, 4)}
    assert list(launches(64, 64)) == ["convolve", "delta_recurrent"]
    assert launches(2112, 64) == {
        "convolve": (66, 64, 1),
        "delta_chunks": (130, 32, 1),
        "delta_recurrent": (64, 32, 4),
        "delta_scan": (64, 32, 4),
    }


def test_heads_that_no_kernel_holds_are_refused() -> None:
    with pytest.raises(FieldError, match=r"value_dim = 512 \(allowed: 1 to 256\)"):
        GatedDeltaOp(replace(SMALL, value_dim=512))
    with pytest.raises(FieldError, match="dtype"):
        GatedDeltaOp(SMALL, "int8")
    with pytest.raises(ValueError, match=r"dtype = bfloat16 on sm75 \(allowed: float16\)"):
        GatedDeltaOp(SMALL).draft(75)
