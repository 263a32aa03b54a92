"""The machine that a benchmark ran on."""

import os
import platform
from pathlib import Path

from moevlm.runtime.perf.process_limits import cores


def facts() -> dict[str, object]:
    """Processor, cores that this process may use, and memory in bytes."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0].split(":", 1)[1].strip() if names else platform.machine(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
