"""Products of e4m3 by e4m3, interpreted, against the numpy spec on activations quantized as the kernels state it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from bench.gpu.cases.experts import ExpertsCall, ExpertsCases, in_e4m3
from bench.variants import BLOCKS
from moevlm.export.formats.float8 import VALUES, nearest
from moevlm.export.formats.gpu_packing import unpack
from moevlm.export.formats.registry import weight_format
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.program import Launch, chosen
from moevlm.plugins.gpu.tiles import table, tiles
from moevlm.plugins.ops.experts import experts as reference_experts
from moevlm.plugins.ops.spec import ExpertsSpec
from tests.plugins.gpu import toy_kernels as toy
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.gpu.test_kernels_experts import draw_inputs

GROUP = 128
TOLERANCE = 2e-3  # relative Frobenius norm: the middle of the spec is float64, so some of it rounds otherwise


def fp8_op(spec: ExpertsSpec, hidden: int = 200, inner: int = 72, has_biases: bool = False) -> ExpertsOp:
    return ExpertsOp(spec, 2, 1, hidden, inner, "float16", "fp8", GROUP, has_biases)


def functions(draft: Draft, tokens: int) -> list[str]:
    steps = chosen(draft.variants, {"T": tokens}).steps
    return [draft.kernels[step.kernel].function for step in steps if isinstance(step, Launch)]


def expected(op: ExpertsOp, inputs: dict[str, np.ndarray], activations: bool = True) -> np.ndarray:
    form = weight_format(*op.form)
    weights = {
        name: unpack(inputs[name], inputs[f"{name}_scale"], form, weight.width).astype(np.float64)
        for name, weight in op.projections.items()
    }
    weights |= {name: inputs[name].astype(np.float64) for name in inputs if name.endswith("_bias")}
    through = partial(in_e4m3, group=GROUP) if activations else np.asarray
    routing = inputs["expert_index"], inputs["expert_weight"]
    return reference_experts(
        through(inputs["x"].astype(np.float64)), *routing, spec=op.spec, between=through, **weights
    )


def distance(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


@pytest.mark.parametrize("has_biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_variant_agrees_with_the_spec(triton_interpreter: Interpreter, name: str, has_biases: bool) -> None:
    op = fp8_op(BLOCKS[name], has_biases=has_biases)
    draft = op.draft(90)
    assert functions(draft, 60)[1:] == ["quantize_rows", "fp8_gate_up", "fp8_down", "combine"]
    inputs = draw_inputs(op, 60, seed=3)
    (y,) = triton_interpreter.run(draft, inputs)
    assert distance(y, expected(op, inputs)) < TOLERANCE
    # ... and not only because quantizing changes nothing that would be seen.
    assert distance(y, expected(op, inputs, activations=False)) > 5 * TOLERANCE


@pytest.mark.parametrize(("sm", "tokens"), [(89, 60), (120, 210), (90, 210), (100, 60)])
def test_several_groups_and_tiles(triton_interpreter: Interpreter, sm: int, tokens: int) -> None:
    op = fp8_op(ExpertsSpec(), hidden=300, inner=290)
    inputs = draw_inputs(op, tokens, seed=sm)
    (y,) = triton_interpreter.run(op.draft(sm), inputs)
    assert distance(y, expected(op, inputs)) < TOLERANCE


def test_rows_of_zeros_and_of_one_large_value(triton_interpreter: Interpreter) -> None:
    op = fp8_op(ExpertsSpec())
    inputs = draw_inputs(op, 60, seed=1)
    inputs["x"][3] = 0
    inputs["x"][4, 7] = 100
    (y,) = triton_interpreter.run(op.draft(90), inputs)
    assert (y[3] == 0).all()
    assert distance(y, expected(op, inputs)) < TOLERANCE


def test_an_index_of_any_content_reads_and_writes_nothing_out_of_bounds(triton_interpreter: Interpreter) -> None:
    op = fp8_op(ExpertsSpec())
    inputs = draw_inputs(op, 60, seed=1)
    wrong = np.random.randint(-(1 << 31), 1 << 31, (60, 1)).astype(np.int32)
    outputs = [
        triton_interpreter.run(op.draft(90), inputs | {"expert_index": index})[0]
        for index in (wrong, wrong.clip(-1, 1))
    ]
    np.testing.assert_array_equal(*outputs)


def test_the_gpu_check_expects_quantized_activations_where_the_kernels_have_them(
    triton_interpreter: Interpreter,
) -> None:
    op, cases = fp8_op(ExpertsSpec()), ExpertsCases()
    draft = op.draft(90)
    assert not any(call.quantized for call in cases.calls(op.draft(80)))
    assert all(call.quantized == (call.tokens > 48) for call in cases.calls(draft))
    call = ExpertsCall(60, quantized=True)
    case = cases.case(op, call, seed=3)
    inputs = {tensor.name: given.float().numpy() for tensor, given in zip(op.inputs, case.inputs, strict=True)}
    found = triton_interpreter.run(draft, inputs)
    assert case.deviation(found) < cases.allowed(op)
    assert cases.case(op, replace(call, quantized=False), seed=3).deviation(found) > 5 * cases.allowed(op)


def test_few_tokens_older_gpus_and_other_groups_keep_their_activations() -> None:
    op = fp8_op(ExpertsSpec())
    assert "fp8_gate_up" in functions(op.draft(89), 60)
    for draft, tokens in ((op.draft(89), 48), (op.draft(86), 60), (op.draft(80), 4000)):
        assert "fp8_gate_up" not in functions(draft, tokens)
    other = ExpertsOp(ExpertsSpec(), 2, 1, 200, 72, "float16", "fp8", 32)
    assert "fp8_gate_up" not in functions(other.draft(90), 4000)


def test_codes_are_those_of_the_format(triton_interpreter: Interpreter) -> None:
    """Every code, the numbers halfway between two, and what is no number."""
    numbers = VALUES.astype(np.float32)
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = np.concatenate([np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1000))])
    values = np.concatenate([numbers, middles, beside])
    values = np.concatenate([values, -values]).astype(np.float32)
    found = triton_interpreter.call(encoded, np.append(values, np.float32(np.nan)))
    assert found[-1] & 0x7F == 0x7F
    np.testing.assert_array_equal(found[:-1], nearest(values.astype(np.float64)))


def encoded(values: np.ndarray) -> np.ndarray:
    """Each value's code, uint8, by the kernels."""
    import torch

    codes = torch.zeros(len(values), dtype=torch.int8)
    toy.encode_codes[(1,)](torch.from_numpy(values), codes, len(values), BLOCK=2048)
    return codes.numpy().view(np.uint8)


@pytest.mark.parametrize("family", ["86", "90", "100"])
def test_a_step_is_a_group_and_a_tile_ends_with_one(family: str) -> None:
    entries = [entry for entry in table()[family]["fp8"]["grouped"] if entry.get("activations")]
    assert entries
    assert {entry["activations"] for entry in entries} == {"fp8"}
    found = [chosen for chosen in tiles(fp8_op(ExpertsSpec()), 90) if chosen.activations]
    for one in found:
        assert (one.gate_up.BK, one.down.BK, one.gate_up.BN % GROUP) == (GROUP, GROUP, 0)
