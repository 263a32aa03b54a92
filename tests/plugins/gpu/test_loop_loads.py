"""Experts' kernels copy ahead all that their loops read. Turing is left out: it has no asynchronous copies."""

from dataclasses import replace

import pytest

from moevlm.plugins.gpu.compiler import KERNELS
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.ops.spec import ExpertsSpec
from moevlm.runtime.core.dtypes import E4M3
from tests.plugins.gpu import toy_kernels as toy
from tests.plugins.gpu.loop_loads import waiting_loads

QWEN3 = ExpertsOp(ExpertsSpec(), 128, 8, 2048, 768)
# Every family of tiles and every generation of Triton's pipelining, which is one for 8.x, 9.x, 10.x and 12.x each.
SPECS: dict[int, tuple[tuple[str, int, str, bool], ...]] = {
    80: (("int4", 32, "", True),),
    86: (("fp8", 32, "", False), ("fp4", 32, "", False)),
    90: (("", 32, "", False), ("int8", 32, "", False), ("int4", 128, "", False), ("fp8", 128, "float32", False)),
    100: (("int8", 128, "", False),),
    120: (("int4", 32, "float16", True), ("fp8", 128, "", False), ("fp4", 16, E4M3, False)),
}
CASES = [(sm, *stored) for sm, all_stored in SPECS.items() for stored in all_stored]


@pytest.mark.parametrize(("sm", "weights", "group_size", "scales", "zeros"), CASES)
def test_no_tensor_is_waited_for_inside_a_loop(
    sm: int, weights: str, group_size: int, scales: str, zeros: bool
) -> None:
    op = replace(QWEN3, weights=weights, group_size=group_size, scales=scales, zeros=zeros)
    found = {
        f"{spec.function} {dict(spec.constants)}": loads
        for spec in op.draft(sm).kernels
        if "TILE" in dict(spec.constants) and (loads := waiting_loads(KERNELS, spec, sm))
    }
    assert not found


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_two_bytes_a_thread_are_no_asynchronous_copy(sm: int) -> None:
    assert waiting_loads(toy.__name__, toy.MATMUL, sm) == []
    (found,) = waiting_loads(toy.__name__, toy.SCALED_MATMUL, sm)
    assert found.startswith("tensor<64x!tt.ptr<f16>")
    assert " at toy_kernels.py:" in found


def test_without_asynchronous_copies_every_load_is_waited_for() -> None:
    assert len(waiting_loads(toy.__name__, toy.MATMUL, 75)) == 2
