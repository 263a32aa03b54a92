"""GatedDelta's kernels in watched memory: no read of what nobody wrote, and no programs that meet in one launch."""

import numpy as np
import pytest

from bench.gated_delta import deviation, draw_inputs
from moevlm.plugins.gpu.ops.gated_delta import GatedDeltaOp
from moevlm.plugins.ops.spec import GatedDeltaSpec
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.gpu.test_kernels_gated_delta import TOLERANCES
from tests.plugins.gpu.watched_draft import run
from tests.support.delta_variants import STEPS

OP = GatedDeltaOp(GatedDeltaSpec(key_heads=1, value_heads=2, key_dim=16, value_dim=48, kernel=4), "float32")


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("step", ["decode", "mixed", "short"])
def test_kernels_read_what_was_written_and_do_not_meet(
    triton_interpreter: Interpreter, step: str, padding: int
) -> None:
    inputs = draw_inputs(OP, STEPS[step], 0, padding)
    unwritten = {t.name: np.isnan(inputs[t.name]).repeat(4) for t in OP.inputs if t.written}
    results = triton_interpreter.call(run, OP.draft(90), inputs, unwritten)
    assert deviation(OP, inputs, results) <= TOLERANCES[OP.dtype]


def test_sequences_that_share_a_row_are_noticed(triton_interpreter: Interpreter) -> None:
    inputs = draw_inputs(OP, STEPS["decode"], 0)
    inputs["state_row"][:] = 1
    with pytest.raises(Exception, match="of the same launch wrote"):
        triton_interpreter.call(run, OP.draft(90), inputs, {})
