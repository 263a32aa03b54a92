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
    """Bytes that this process may still take: what is free, and at most what its control groups leave. None if unknown.

    A group leaves its limit less what its processes use; cached pages of files that nobody used lately are not counted
    as used, as the kernel gives them up before it refuses memory.
    Source: the kernel's documentation, cgroup-v2 (memory.max, memory.current, memory.stat) and cgroup-v1
    (memory.limit_in_bytes, memory.usage_in_bytes, memory.stat).
    """
    limits = [memory("MemAvailable", meminfo), *(_memory_left(folder) for folder in _folders("memory", groups, root))]
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


# Of cgroup-v2 and cgroup-v1: the limit, what is used under it, and the field of memory.stat that counts idle file cache
# of the group and all below it.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _memory_left(folder: Path) -> int | None:
    """Bytes that a control group still allows, all of its limit if it does not say what is used; None for no limit."""
    for limit, usage, cache in _MEMORY_FILES:
        allowed = _number(folder / limit)
        if allowed is not None:
            used = _number(folder / usage) or 0
            return max(0, allowed - max(0, used - _statistic(folder / "memory.stat", cache)))
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _statistic(path: Path, field: str) -> int:
    """A field of memory.stat; 0 if it is not there."""
    try:
        found = re.search(rf"^{field} (\d+)$", path.read_text(), flags=re.M)
    except OSError:
        return 0
    return int(found[1]) if found else 0
