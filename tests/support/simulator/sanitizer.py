"""Triton's interpreter with every access of a kernel to memory watched. Only where TRITON_INTERPRET=1 was set."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton._C.libtriton import interpreter as memory_access
from triton.runtime import interpreter

from bench.gpu.launch import launch
from moevlm.plugins.gpu.draft import KernelSpec
from tests.support.simulator.memory import Memory

_DTYPES = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*i8": torch.int8,
    "*fp8e4nv": torch.float8_e4m3fn,
}


class Watched:
    """The interpreter's own functions on memory."""

    def __init__(self, real: Any, memory: Memory) -> None:
        self._real, self._memory = real, memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load(self, addresses: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        self._memory.loads(addresses[np.broadcast_to(mask, addresses.shape)], np.dtype(dtype).itemsize)
        return self._real.load(addresses, mask, other, dtype)

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray) -> Any:
        self._memory.stores(addresses[np.broadcast_to(mask, addresses.shape)], values.dtype.itemsize)
        return self._real.store(addresses, values, mask)

    def atomic_rmw(self, op: Any, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray, order: Any) -> Any:
        active = addresses[np.broadcast_to(mask, addresses.shape)]
        self._memory.atomics(active, values.dtype.itemsize)
        return self._real.atomic_rmw(op, addresses, values, mask, order)

    def atomic_cas(self, addresses: np.ndarray, expected: np.ndarray, values: np.ndarray, order: Any) -> Any:
        self._memory.atomics(addresses, values.dtype.itemsize)
        return self._real.atomic_cas(addresses, expected, values, order)


@contextmanager
def watched(memory: Memory) -> Iterator[None]:
    """Within the block kernels may access this memory alone. Raises MemoryFault, inside of an InterpreterError."""
    real, place = interpreter._interpreter, interpreter.interpreter_builder.set_grid_idx

    def set_grid_idx(x: int, y: int, z: int) -> None:
        memory.program += 1
        place(x, y, z)

    # Whatever else stands before it: this one knows all that is allocated, and not the arguments of a launch alone.
    interpreter._interpreter = Watched(memory_access, memory)
    interpreter.interpreter_builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        interpreter._interpreter = real
        del interpreter.interpreter_builder.set_grid_idx


def run_kernel(
    memory: Memory,
    spec: KernelSpec,
    grid: tuple[int, ...],
    arguments: Sequence[int],
    padding: Sequence[tuple[int, int]] = (),
) -> None:
    """One launch. arguments: addresses, 0 for a null pointer, and numbers. padding: see `Memory.begin_launch`.

    To be called inside of `watched`.
    """
    memory.begin_launch(padding)
    given = [
        (pointer(value, kind) if value else None) if kind.startswith("*") else value
        for kind, value in zip(spec.types, arguments, strict=True)
    ]
    launch(spec, grid, given)


def pointer(address: int, kind: str) -> torch.Tensor:
    """What a kernel is given for a parameter of this type: the interpreter reads where it is, and its dtype."""
    dtype = _DTYPES[kind]
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)
