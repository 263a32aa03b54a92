"""Grouped products that stay and read weights by tensor maps: a tile entry chooses them."""

from collections.abc import Callable

import numpy as np
import pytest

from bench.variants import BLOCKS
from moevlm.plugins.gpu import compiler
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.program import Launch, chosen
from moevlm.plugins.gpu.tiles import table
from moevlm.plugins.ops.spec import ExpertsSpec
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.gpu.loop_loads import lowered, waiting_loads
from tests.plugins.gpu.test_kernels_experts import draw_inputs, expected

QWEN3 = ExpertsOp(ExpertsSpec(), 128, 8, 2048, 768)
Choose = Callable[[int], None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Have the largest ranges of tokens use so many programs."""

    def choose(programs: int) -> None:
        for family in ("90", "100"):
            monkeypatch.setitem(table()[family]["16"]["grouped"][-1], "programs", programs)

    return choose


def steps(draft: Draft, tokens: int) -> dict[str, Launch]:
    found = (step for step in chosen(draft.variants, {"T": tokens}).steps if isinstance(step, Launch))
    return {draft.kernels[step.kernel].function: step for step in found}


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_tiles_are_shared_out_to_any_number_of_programs(
    triton_interpreter: Interpreter, choose: Choose, programs: int
) -> None:
    choose(programs)
    op = ExpertsOp(ExpertsSpec(), 2, 1, hidden=144, inner=136, dtype="float16", has_biases=True)
    inputs = draw_inputs(op, 300, seed=programs)
    draft = op.draft(90)
    assert steps(draft, 300)["persistent_gate_up"].grid[0].at({}) == programs
    (y,) = triton_interpreter.run(draft, inputs)
    want = expected(op, inputs)
    assert np.linalg.norm(y - want) <= 2e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_variant_agrees_with_the_spec(triton_interpreter: Interpreter, choose: Choose, name: str) -> None:
    choose(5)
    op = ExpertsOp(BLOCKS[name], 1, 1, hidden=40, inner=24, dtype="float16")
    inputs = draw_inputs(op, 130, seed=7)
    draft = op.draft(100)
    assert "persistent_down" in steps(draft, 130)
    (y,) = triton_interpreter.run(draft, inputs)
    want = expected(op, inputs)
    assert np.linalg.norm(y - want) <= 2e-3 * np.linalg.norm(want)


def test_an_index_of_any_content_reads_and_writes_nothing_out_of_bounds(
    triton_interpreter: Interpreter, choose: Choose
) -> None:
    choose(5)
    op = ExpertsOp(ExpertsSpec(), 1, 1, hidden=40, inner=24, dtype="float16")
    inputs = draw_inputs(op, 130, seed=7)
    wrong = np.random.randint(-(1 << 31), 1 << 31, (130, 1)).astype(np.int32)
    outputs = [
        triton_interpreter.run(op.draft(90), inputs | {"expert_index": index})[0]
        for index in (wrong, wrong.clip(-1, 0))
    ]
    np.testing.assert_array_equal(*outputs)


def test_rows_that_no_map_takes_quantized_weights_and_older_gpus_keep_the_others(choose: Choose) -> None:
    choose(5)
    assert "persistent_gate_up" in steps(QWEN3.draft(90), 1 << 14)
    for op, sm in (
        (QWEN3, 80),
        (QWEN3, 120),
        (ExpertsOp(ExpertsSpec(), 128, 8, 2048, 767), 90),
        (ExpertsOp(ExpertsSpec(), 128, 8, 2048, 768, weights="int8"), 90),
    ):
        assert "persistent_gate_up" not in steps(op.draft(sm), 1 << 14)


@pytest.mark.parametrize("sm", [90, 100])
def test_a_program_reads_its_next_tile_while_it_finishes_one(choose: Choose, sm: int) -> None:
    """One loop over all tiles and their steps, in which nothing but the next tile's list of rows is waited for."""
    choose(132)
    specs = [spec for spec in QWEN3.draft(sm).kernels if spec.function.startswith("persistent")]
    assert len(specs) == 2
    for spec in specs:
        text = lowered(compiler.KERNELS, spec, sm)
        assert text.count("scf.for") == 1
        assert "async_tma_copy" in text
        (rows,) = waiting_loads(compiler.KERNELS, spec, sm)
        assert rows.startswith("tensor<128x!tt.ptr<i32>")
    compiled = compiler._compile([(compiler.KERNELS, spec, sm) for spec in specs], lambda *_: None)
    assert [(one.resources.spilled, len(one.maps)) for one in compiled.values()] == [(0, 1), (0, 1)]
