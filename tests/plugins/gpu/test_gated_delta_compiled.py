"""GatedDelta's kernels compiled: what they take of a GPU, what they read ahead, and what they wait for."""

import pytest

from moevlm.plugins.gpu.compiler import KERNELS, compile_program, resources
from moevlm.plugins.gpu.devices import REGISTERS_PER_BLOCK
from moevlm.plugins.gpu.ops.gated_delta import GatedDeltaOp
from moevlm.plugins.ops.spec import GatedDeltaSpec
from tests.plugins.gpu.loop_loads import lowered, waiting_loads

QWEN = GatedDeltaOp(GatedDeltaSpec(key_heads=16, value_heads=32, key_dim=128, value_dim=128, kernel=4))


def test_kernels_fit_their_gpu_and_keep_their_registers() -> None:
    sms = [86, 90, 100]  # every generation of matrix products
    program = compile_program(QWEN, sms)
    assert (program.op, program.inputs, program.outputs) == ("GatedDelta", QWEN.inputs, QWEN.outputs)
    found = resources(QWEN, sms)
    assert {kernel.entry for kernel in found} == {"convolve", "delta_recurrent", "delta_chunks", "delta_scan"}
    assert all(kernel.spilled == 0 for kernel in found)
    for kernel in (each for each in found if each.entry == "delta_recurrent"):  # of a large step many run at once
        assert 4 * kernel.registers * 32 * kernel.warps <= REGISTERS_PER_BLOCK


@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_the_chain_of_chunks_waits_for_no_load(sm: int) -> None:
    (scan,) = (spec for spec in QWEN.draft(sm).kernels if spec.function == "delta_scan")
    assert waiting_loads(KERNELS, scan, sm) == []


def test_launches_of_a_step_overlap_and_kernels_wait_before_they_touch_what_others_write() -> None:
    draft = QWEN.draft(90)
    for variant in draft.variants:
        assert [step.overlaps for step in variant.steps] == [False] + [True] * (len(variant.steps) - 1)
    for spec in {spec.function: spec for spec in draft.kernels}.values():
        before, after = lowered(KERNELS, spec, 90, "ptx").split("griddepcontrol.wait", 1)
        assert not [word for word in ("st.", "cp.async") if word in before]
        # Only the state that the program itself is to change is read ahead, and whose it is.
        assert ("ld.global" in before) == (spec.function == "delta_recurrent")
        assert "st." in after
