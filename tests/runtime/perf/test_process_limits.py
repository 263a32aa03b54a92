"""The cores, processor time and memory that a process may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from moevlm.runtime.perf import process_limits
from moevlm.runtime.perf.process_limits import available_memory, cores, cpu_quota


def control_groups(tmp_path: Path, lines: str, **files: str) -> dict[str, Path]:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text(lines)
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"groups": groups, "root": root}


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a__b__cpu.max": "max 100000\n", "a__cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b\n", {"a__b__cpu.max": "50000 100000\n", "a__cpu.max": "200000 100000\n"}, 0.5),
        ("0::/not/here\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (
            "3:memory:/x\n2:cpu,cpuacct:/x\n",
            {"cpu,cpuacct__x__cpu.cfs_quota_us": "400000\n", "cpu,cpuacct__x__cpu.cfs_period_us": "100000\n"},
            4.0,
        ),
        (
            "2:cpu,cpuacct:/x\n",
            {"cpu,cpuacct__x__cpu.cfs_quota_us": "-1\n", "cpu,cpuacct__x__cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_quota_of_the_control_groups(lines: str, files: dict, expected: float | None, tmp_path: Path) -> None:
    assert cpu_quota(**control_groups(tmp_path, lines, **files)) == expected


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "absent", tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.5, 1), (2.0, 2), (2.5, 3), (64.0, 8)])
def test_cores_are_those_allowed_and_no_more_than_the_quota(
    quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_limits.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(process_limits, "cpu_quota", lambda: quota)
    assert cores() == expected


@pytest.mark.parametrize(
    ("meminfo", "lines", "files", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable:    2000 kB\n", "", {}, 2_048_000),
        ("MemAvailable: 2000 kB\n", "0::/\n", {"memory.max": "1000000\n"}, 1_000_000),
        ("MemAvailable: 2000 kB\n", "0::/\n", {"memory.max": "max\n"}, 2_048_000),
        ("MemAvailable: 2000 kB\n", "0::/a/b\n", {"a__b__memory.max": "max\n", "a__memory.max": "5000\n"}, 5000),
        ("MemAvailable: 2000 kB\n", "4:memory:/x\n", {"memory__x__memory.limit_in_bytes": "7000\n"}, 7000),
        ("nonsense", "0::/\n", {"memory.max": "nonsense"}, None),
    ],
)
def test_available_memory_ends_at_the_limit_of_the_control_groups(
    meminfo: str, lines: str, files: dict, expected: int | None, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text(meminfo)
    assert available_memory(tmp_path / "meminfo", **control_groups(tmp_path, lines, **files)) == expected


VERSION_2 = {"memory.max": "9000\n", "memory.current": "5000\n"}
VERSION_1 = {"memory__x__memory.limit_in_bytes": "9000\n", "memory__x__memory.usage_in_bytes": "5000\n"}


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", VERSION_2, 4000),
        ("0::/\n", VERSION_2 | {"memory.stat": "anon 3000\ninactive_file 1500\nactive_file 500\n"}, 5500),
        ("0::/\n", VERSION_2 | {"memory.stat": "anon 3000\n"}, 4000),
        ("0::/\n", VERSION_2 | {"memory.current": "9999\n"}, 0),
        ("0::/\n", VERSION_2 | {"memory.stat": "inactive_file 7000\n"}, 9000),
        ("0::/a\n", {f"a__{name}": text for name, text in VERSION_2.items()} | {"memory.max": "5000\n"}, 4000),
        (
            "0::/a\n",
            {"a__memory.max": "8000\n", "a__memory.current": "100\n"} | VERSION_2 | {"memory.current": "8500\n"},
            500,
        ),
        ("4:memory:/x\n", VERSION_1, 4000),
        ("4:memory:/x\n", VERSION_1 | {"memory__x__memory.stat": "inactive_file 9\ntotal_inactive_file 1000\n"}, 5000),
    ],
    ids=[
        "used",
        "idle file cache",
        "no cache said",
        "over the limit",
        "more cache than used",
        "own group is tighter",
        "parent is tighter",
        "version 1",
        "version 1, cache of all below",
    ],
)
def test_memory_that_control_groups_use_is_not_available(
    lines: str, files: dict, expected: int, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 2000 kB\n")
    assert available_memory(tmp_path / "meminfo", **control_groups(tmp_path, lines, **files)) == expected


def test_memory_is_unknown_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "absent", tmp_path / "absent", tmp_path) is None
