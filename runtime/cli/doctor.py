"""Finds what this machine has, what each kind of target needs, and the command that installs what is missing.

Every probe answers for itself: one that fails says so in its place, and the others go on.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import msgspec

from moevlm.runtime.backends.libraries import OPERATORS, PLUGIN, instruction_set, operators_path, plugin_path
from moevlm.runtime.core.errors import EngineError, MoevlmError, reason
from moevlm.runtime.core.installation import install_command
from moevlm.runtime.core.reports import Report
from moevlm.runtime.perf.process_limits import available_memory, cores, cpu_quota, memory

_GPU = "an NVIDIA GPU"
# By kind of target: the extras and other things that running it and building it take.
_RUN = {
    "cpu": ("cpu", OPERATORS),
    "ort-cpu": ("cpu",),
    "reference": ("cpu",),
    "rtx": ("rtx", PLUGIN, _GPU),
    "trt": ("trt", PLUGIN, _GPU),
}
_BUILD = {
    "cpu": ("export",),
    "ort-cpu": ("export",),
    "reference": ("export",),
    "rtx": ("export", "kernels", "rtx", PLUGIN),
    "trt": ("export", "kernels", "trt", PLUGIN, _GPU),
}
_EXTRAS = ("cpu", "export", "kernels", "rtx", "trt")
_FAILURES = (MoevlmError, OSError, ValueError, LookupError, AttributeError, subprocess.SubprocessError)  # of probes
_LIBRARIES = {OPERATORS: operators_path, PLUGIN: plugin_path}


class Gpu(msgspec.Struct, frozen=True):
    """sm: 89 for compute capability 8.9. driver: the CUDA version of its driver, 13000 for 13.0."""

    name: str
    sm: int
    driver: int


class TargetReport(msgspec.Struct, frozen=True):
    """missing_to_run, missing_to_build: what this machine lacks, each with its remedy; empty where nothing is."""

    target: str
    missing_to_run: list[str]
    missing_to_build: list[str]


class DoctorReport(Report, frozen=True, tag="moevlm.doctor/1"):
    """`moevlm doctor --json`.

    cores: that this process may use. quota: cores' time that its control groups allow, null for all of them.
    memory, available_memory: bytes, the latter within the limit of its control groups; null where the system does not
    say. instruction_set: that the operators chose;
    instruction_problem: why they cannot. compiler: first line of g++ --version. gpu_problem: why there is none.
    packages: version by name, null for one that is not installed. libraries: path by name, null for one not built.
    """

    moevlm: str
    folder: str
    python: str
    system: str
    processor: str
    instruction_set: str
    instruction_problem: str
    cores: int
    quota: float | None
    memory: int | None
    available_memory: int | None
    compiler: str
    gpu: Gpu | None
    gpu_problem: str
    packages: dict[str, str | None]
    libraries: dict[str, str | None]
    targets: list[TargetReport]


def examine() -> DoctorReport:
    """Look at this machine. Raises nothing: what cannot be found out is reported as missing."""
    packages = {name: _version(name) for extra in _EXTRAS for name in _packages(extra)}
    paths = {name: _try(path, None) for name, path in _LIBRARIES.items()}
    libraries = {name: None if path is None else str(path) for name, path in paths.items()}
    gpu, problem = _gpu()
    missing = {_GPU: problem} if problem else {}
    for name, path in libraries.items():
        if path is None:
            missing[name] = f"{name} is not built (install g++, then {install_command()})"
    for extra in _EXTRAS:
        if absent := [name for name in _packages(extra) if packages[name] is None]:
            missing[extra] = f"{', '.join(absent)} ({install_command(extra)})"
    return DoctorReport(
        moevlm=_version("moevlm") or "not installed",
        folder=str(Path(__file__).parents[2]),
        python=platform.python_version(),
        system=platform.platform(),
        processor=_try(_processor, "") or platform.machine(),
        instruction_set=_try(instruction_set, ""),
        instruction_problem=_problem(instruction_set),
        cores=cores(),
        quota=cpu_quota(),
        memory=memory("MemTotal"),
        available_memory=available_memory(),
        compiler=_try(_compiler, ""),
        gpu=gpu,
        gpu_problem=problem,
        packages=packages,
        libraries=libraries,
        targets=[
            TargetReport(
                kind,
                [missing[need] for need in _RUN[kind] if need in missing],
                [missing[need] for need in _BUILD[kind] if need in missing],
            )
            for kind in _RUN
        ],
    )


def _try(probe: Callable[[], Any], otherwise: Any) -> Any:
    """A probe's answer; `otherwise` if it fails, whatever this machine makes of it."""
    try:
        return probe()
    except _FAILURES:
        return otherwise


def _problem(probe: Callable[[], Any]) -> str:
    """Why a probe fails; empty where it does not."""
    try:
        probe()
    except _FAILURES as error:
        return reason(error)
    return ""


def _packages(extra: str) -> list[str]:
    """The distributions that an extra of this package names."""
    wanted = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    return [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in _requirements() if wanted.search(text)]


def _requirements() -> list[str]:
    try:
        return requires("moevlm") or []
    except PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> tuple[Gpu | None, str]:
    """The first GPU, or why there is none."""
    from moevlm.runtime.backends.tensorrt.driver import find_gpu

    try:
        found = find_gpu()
    except EngineError as error:
        return None, str(error)
    return Gpu(found.name, found.sm, found.driver), ""


def _processor() -> str:
    """Its name as the kernel has it (Linux); raises OSError elsewhere."""
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    return names[0]


def _compiler() -> str:
    done = subprocess.run(["g++", "--version"], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.splitlines()[0]
