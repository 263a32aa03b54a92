"""What the watched memory of interpreted kernels refuses, on kernels that are wrong in one way each."""

from __future__ import annotations

import numpy as np
import pytest
import triton
import triton.language as tl

from tests.plugins.gpu.interpreter import Interpreter

BLOCK = 4


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def shift(x, y, n, BLOCK: tl.constexpr):
    """In place if x is y: then a program writes what the next one reads."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + (i + 1) % n, tl.load(x + i))


@triton.jit
def add_up(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + i, mask=i < n, other=0.0)))


@triton.jit
def write_once(x, y, n, BLOCK: tl.constexpr):
    """All programs write one place."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + i, mask=i < n, other=0.0)))


def run(
    name: str, values: list[float], size: int = 0, written: int | None = None, padding: bool = False
) -> list[float]:
    """y after a launch. size: of y in floats, of which the first `written` are zeros; 0 for x itself."""
    from tests.support.simulator.memory import Memory
    from tests.support.simulator.sanitizer import pointer, watched

    memory = Memory()
    x = y = memory.add(np.array(values, np.float32))
    if size:
        y, _ = memory.allocate(4 * size)
        memory.write(y, np.zeros(size if written is None else written, np.float32))
    with watched(memory):
        memory.begin_launch([(y, y + 4 * size)] if padding else [])
        n = len(values)
        globals()[name][(-(-n // BLOCK),)](pointer(x, "*fp32"), pointer(y, "*fp32"), n, BLOCK=BLOCK)
    return memory.view(y, 4 * (size or len(values))).view(np.float32).tolist()


def test_right_kernels_pass(triton_interpreter: Interpreter) -> None:
    assert triton_interpreter.call(run, "copy", [1, 2, 3, 4, 5], 5, 0) == [1, 2, 3, 4, 5]
    assert triton_interpreter.call(run, "shift", [1, 2, 3, 4, 5, 6, 7, 8], 8, 0) == [8, 1, 2, 3, 4, 5, 6, 7]
    assert triton_interpreter.call(run, "add_up", [1, 2, 3, 4, 5], 1) == [15]
    assert triton_interpreter.call(run, "shift", [1, 2, 3, 4]) == [4, 1, 2, 3]  # one program


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("copy", {"values": [1, 2, 3, 4, 5], "size": 4}, "0 bytes past the end of a block of 16 bytes is written"),
        ("add_up", {"values": [1, 2], "size": 1, "written": 0}, "1 of 1 values are read and were never written"),
        (
            "shift",
            {"values": [1, 2, 3, 4, 5, 6, 7, 8]},
            "program 1 reads byte 16 .* program 0 .* wrote",
        ),
        ("write_once", {"values": [1, 2, 3, 4, 5], "size": 1}, "program 1 writes byte 0 .* program 0 .* wrote"),
    ],
)
def test_a_wrong_access_is_refused(
    triton_interpreter: Interpreter, name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        triton_interpreter.call(run, name, *options.values())


def test_what_padding_writes_may_meet(triton_interpreter: Interpreter) -> None:
    assert triton_interpreter.call(run, "write_once", [1, 2, 3, 4, 5], 1, None, True) == [5]
