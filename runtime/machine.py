"""What this machine can do at most: read memory, multiply floats, multiply bytes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import msgspec
import numpy as np

from moevlm.runtime.native import operators_path

READ_BYTES = 256 << 20  # per thread: larger than any cache
ROUNDS = 2_000_000  # a few milliseconds
REPEATS = 5


class Machine(msgspec.Struct, frozen=True):
    """Limits of `threads` cores together, the best of a few measurements.

    read: bytes per second from memory. float32, int8: multiply-adds per second; int8 is float32's where the processor
    has no dot product of bytes.
    """

    threads: int
    read: float
    float32: float
    int8: float


def cores() -> int:
    """How many this process may use, which a container or taskset makes less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_machine(threads: int | None = None) -> Machine:
    """Takes about a second. threads: None for all cores of this process. Raises EngineError without the library."""
    count = threads or cores()
    library = ctypes.CDLL(str(operators_path()))
    library.moevlm_peak_read.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    for function in (library.moevlm_peak_float32, library.moevlm_peak_int8):
        function.argtypes, function.restype = (ctypes.c_size_t,), ctypes.c_size_t
    memory = [np.ones(READ_BYTES, np.uint8) for _ in range(count)]

    def read(i: int) -> int:
        library.moevlm_peak_read(memory[i].ctypes.data, READ_BYTES)
        return READ_BYTES

    with ThreadPoolExecutor(count) as pool:
        float32 = _best(pool, count, lambda _: library.moevlm_peak_float32(ROUNDS))
        int8 = _best(pool, count, lambda _: library.moevlm_peak_int8(ROUNDS))
        return Machine(count, _best(pool, count, read), float32, max(int8, float32))


def _best(pool: ThreadPoolExecutor, count: int, work: Callable[[int], int]) -> float:
    """The most work per second that `count` calls at once did."""
    rates = []
    for _ in range(REPEATS):
        started = perf_counter()
        done = sum(pool.map(work, range(count)))
        rates.append(done / (perf_counter() - started))
    return max(rates)
