"""What this machine can do at most: read memory, multiply floats, multiply bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median
from time import perf_counter

import msgspec
import numpy as np

from moevlm.runtime.backends.libraries import operators_path
from moevlm.runtime.perf.process_limits import cores

READ_BYTES = 2 << 30  # of all threads together: larger than any cache
THREAD_READ_BYTES = 256 << 20  # of one at most
ROUNDS = 2_000_000  # a few milliseconds
REPEATS = 5
INSTRUCTION_SETS = (3, 2, 1, 0)  # by their numbers in plugins/cpu/simd/instruction_set.h, the best first
COPY_BYTES = 256 << 20  # larger than any GPU's cache
COPIES = 20


class Machine(msgspec.Struct, frozen=True):
    """Limits of `threads` cores together, the best of a few measurements.

    read: bytes per second from memory. float32, int8: multiply-adds per second, int8 of bytes.
    """

    threads: int
    read: float
    float32: float
    int8: float


class GpuMachine(msgspec.Struct, frozen=True):
    """copied: bytes per second that a GPU reads and writes, together, while it copies its memory: median of several."""

    name: str
    copied: float


def measure_machine(threads: int | None = None, clock: Callable[[], float] = perf_counter) -> Machine:
    """Takes about a second. threads: None for all cores of this process. Raises EngineError without the library."""
    count = threads or cores()
    library = ctypes.CDLL(str(operators_path()))
    library.moevlm_peak_read.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    for function in (library.moevlm_peak_float32, library.moevlm_peak_int8):
        function.argtypes, function.restype = (ctypes.c_int, ctypes.c_size_t), ctypes.c_size_t
    best = next(number for number in INSTRUCTION_SETS if library.moevlm_peak_float32(number, 1))
    size = min(THREAD_READ_BYTES, READ_BYTES // count // 256 * 256)
    memory = [np.ones(size, np.uint8) for _ in range(count)]

    def read(i: int) -> int:
        library.moevlm_peak_read(memory[i].ctypes.data, size)
        return size

    with ThreadPoolExecutor(count) as pool:
        float32 = _best(pool, count, clock, lambda _: library.moevlm_peak_float32(best, ROUNDS))
        int8 = _best(pool, count, clock, lambda _: library.moevlm_peak_int8(best, ROUNDS))
        return Machine(count, _best(pool, count, clock, read), float32, int8)


def measure_gpu() -> GpuMachine:
    """Takes some milliseconds and half a GB on the device. Raises EngineError without a GPU, or if it has no room."""
    from moevlm.runtime.backends.tensorrt.cuda import Device

    device, times = Device(), []
    with ExitStack() as stack:
        stack.callback(device.close)
        stack.enter_context(device)
        source = device.allocate(COPY_BYTES)
        stack.callback(source.free)
        target = device.allocate(COPY_BYTES)
        stack.callback(target.free)
        device.clear(source.address, source.size)
        begin, end = (stack.enter_context(device.event(timed=True)) for _ in range(2))
        for _ in range(COPIES + 1):
            begin.record()
            device.copy_within(target.address, source.address, COPY_BYTES)
            end.record()
            end.wait()
            times.append(end.seconds_since(begin))
    return GpuMachine(device.gpu.name, 2 * COPY_BYTES / median(times[1:]))


def _best(pool: ThreadPoolExecutor, count: int, clock: Callable[[], float], work: Callable[[int], int]) -> float:
    """The most work per second that `count` calls at once did."""
    rates = []
    for _ in range(REPEATS):
        started = clock()
        done = sum(pool.map(work, range(count)))
        rates.append(done / (clock() - started))
    return max(rates)
