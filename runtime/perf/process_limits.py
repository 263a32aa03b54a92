"""The cores, processor time and memory that this process may use."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

_MEMINFO, _CONTROL_GROUPS, _ROOT = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cores() -> int:
    """The number of cores for this process, which a container or taskset makes less than the machine has."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, math.ceil(cpu_quota() or allowed))


def cpu_quota(groups: Path = _CONTROL_GROUPS, root: Path = _ROOT) -> float | None:
    """Processor time in cores that the control groups of this process allow (`docker run --cpus`); None for no limit.

    Source: the kernel's documentation, cgroup-v2 (cpu.max) and cgroup-v1 (cpu.cfs_quota_us, cpu.cfs_period_us).
    """
    quotas = [_quota(folder) for folder in _folders("cpu", groups, root)]
    return min((quota for quota in quotas if quota), default=None)


def available_memory(meminfo: Path = _MEMINFO, groups: Path = _CONTROL_GROUPS, root: Path = _ROOT) -> int | None:
    """Bytes that this process may still take: what is free, and at most what its control groups allow. None if unknown.

    Source: the kernel's documentation, cgroup-v2 (memory.max) and cgroup-v1 (memory.limit_in_bytes).
    """
    limits = [memory("MemAvailable", meminfo), *(_memory_limit(folder) for folder in _folders("memory", groups, root))]
    return min((limit for limit in limits if limit is not None), default=None)


def memory(field: str, meminfo: Path = _MEMINFO) -> int | None:
    """Bytes of a field of /proc/meminfo, such as MemTotal; None if unknown."""
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB$", meminfo.read_text(), flags=re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _folders(controller: str, groups: Path, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups, and of their parents, for a controller."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, group in lines:
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        folder = base / group.lstrip("/")
        # A container sees its own group as the root: what its path names is not there.
        for place in (folder, *folder.parents):
            yield place
            if place == base:
                break


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{what}_us").read_text().strip() for what in ("quota", "period"))
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _memory_limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None
