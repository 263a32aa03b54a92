"""The bounds that interpreted kernels are held to, on a kernel that reads by an index that is data."""

import pytest

from tests.plugins.gpu import toy_kernels as toy
from tests.plugins.gpu.guarded_memory import OutOfBounds
from tests.plugins.gpu.interpreter import Interpreter


def gather(index: list[int], size: int) -> list[float]:
    import torch

    x, y = torch.arange(8.0), torch.zeros(size)
    toy.gather[(1,)](x, torch.tensor(index, dtype=torch.int32), y, len(index), BLOCK=8)
    return y.tolist()


def test_accesses_inside_the_arguments_pass(triton_interpreter: Interpreter) -> None:
    assert triton_interpreter.call(gather, [7, 0, 3], 3) == [7, 0, 3]


@pytest.mark.parametrize("index", [-1, 8, 1 << 30, -(1 << 31)])
def test_a_read_outside_is_refused(triton_interpreter: Interpreter, index: int) -> None:
    with pytest.raises(Exception, match="1 of 3 addresses to read") as found:
        triton_interpreter.call(gather, [7, index, 3], 3)
    assert OutOfBounds.__name__ in str(found.getrepr())


def test_a_write_outside_is_refused(triton_interpreter: Interpreter) -> None:
    with pytest.raises(Exception, match=r"1 of 3 addresses to write, one \+0 bytes off"):
        triton_interpreter.call(gather, [7, 0, 3], 2)
