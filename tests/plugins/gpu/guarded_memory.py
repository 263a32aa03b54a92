"""Triton's interpreter with bounds: an access outside the tensors that a launch was given is an error, not a crash."""

from collections.abc import Iterable
from typing import Any

import numpy as np


class OutOfBounds(Exception):
    """A kernel reads or writes outside its arguments."""


class GuardedMemory:
    """Stands before Triton's module that reads and writes memory, and checks each address that is not masked off."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._starts = self._ends = np.zeros(0, np.uint64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def allow(self, tensors: Iterable[Any]) -> None:
        """Nothing but the bytes of these may be touched from now on; the tensors are contiguous."""
        ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
        starts, ends = zip(*ranges, strict=True) if ranges else ((), ())
        # One range may lie in another, as the workspace's buffers do: the furthest end of those that start before.
        self._starts, self._ends = np.array(starts, np.uint64), np.maximum.accumulate(np.array(ends, np.uint64))

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        self._check("read", pointers, mask, np.dtype(dtype).itemsize)
        return self._module.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        self._check("write", pointers, mask, values.dtype.itemsize)
        self._module.store(pointers, values, mask)

    def atomic_rmw(self, kind: Any, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray, sem: Any) -> np.ndarray:
        self._check("write", pointers, mask, values.dtype.itemsize)
        return self._module.atomic_rmw(kind, pointers, values, mask, sem)

    def _check(self, what: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        used = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.uint64)
        place = np.searchsorted(self._starts, used, "right")
        ends = np.concatenate([np.zeros(1, np.uint64), self._ends])[place]
        wrong = used + np.uint64(size) > ends
        if wrong.any():
            first = int(used[wrong][0])
            nearest = min(
                (*map(int, self._starts), *map(int, self._ends)), key=lambda edge: abs(edge - first), default=0
            )
            raise OutOfBounds(f"{wrong.sum()} of {wrong.size} addresses to {what}, one {first - nearest:+d} bytes off")


def install() -> None:
    """Guard every launch in this process, which Triton interprets."""
    from triton.runtime import interpreter

    memory = GuardedMemory(interpreter._interpreter)
    arguments = interpreter.GridExecutor._init_args_hst

    def guarded(self: Any, given: Any, named: Any) -> Any:
        hosted = arguments(self, given, named)
        bases = (getattr(each, "base", each) for each in (*hosted[0], *hosted[1].values()))  # of tensor maps
        memory.allow(tensor for tensor in bases if hasattr(tensor, "data_ptr"))
        return hosted

    interpreter._interpreter = memory
    interpreter.GridExecutor._init_args_hst = guarded
