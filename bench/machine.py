"""The machine that a benchmark ran on: what it is, and how fast it reads memory and multiplies at best."""

import os
import platform
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

READ_BYTES = 1 << 30
MATRIX = 2048


def facts() -> dict[str, object]:
    """Processor, cores that this process may use, and memory in bytes."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0].split(":", 1)[1].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def limits(threads: int, repeats: int = 5) -> dict[str, float]:
    """read_bytes_per_second of main memory, and flops of square bf16 and fp32 products; medians, on `threads` cores."""
    torch.set_num_threads(threads)
    block = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    result = {"read_bytes_per_second": READ_BYTES / _seconds(lambda: block.sum(), repeats)}
    for dtype, name in ((torch.float32, "fp32_flops"), (torch.bfloat16, "bf16_flops")):
        matrix = torch.ones(MATRIX, MATRIX, dtype=dtype)
        result[name] = 2 * MATRIX**3 / _seconds(lambda matrix=matrix: matrix @ matrix, repeats)
    return result


def _seconds(run, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        started = perf_counter()
        run()
        times.append(perf_counter() - started)
    return median(times[1:])
