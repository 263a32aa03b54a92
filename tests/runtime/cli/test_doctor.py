"""What `moevlm doctor` says of a machine, and that nothing about a machine makes it fail."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from moevlm.runtime.backends import libraries as native
from moevlm.runtime.cli import doctor
from moevlm.runtime.cli.doctor import examine
from moevlm.runtime.core.installation import install_command
from moevlm.runtime.perf.process_limits import cores
from tests.support.command_line import COMMAND, call, environment
from tests.support.fakes.gpu import fake_gpu


def missing(report: doctor.DoctorReport) -> dict[str, tuple[list[str], list[str]]]:
    return {target.target: (target.missing_to_run, target.missing_to_build) for target in report.targets}


def test_this_machine_runs_and_builds_cpu_targets() -> None:
    report = examine()
    assert missing(report)["cpu"] == missing(report)["ort-cpu"] == ([], [])
    assert report.cores == cores()
    assert report.instruction_set == native.instruction_set()
    assert report.packages["onnxruntime"]
    assert "g++" in report.compiler
    assert report.memory is None or report.memory > 1 << 30


def test_without_a_package_the_targets_that_need_it_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("torch", "triton") else real(name))
    report = examine()
    assert report.packages["torch"] is None
    assert missing(report)["cpu"] == ([], [f"torch ({install_command('export')})"])
    assert {f"torch ({install_command('export')})", f"triton ({install_command('kernels')})"} <= {
        *missing(report)["rtx"][1]
    }


def test_without_libraries_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    report = examine()
    assert (report.compiler, report.instruction_set) == ("", "")
    assert report.libraries == {"cpu_operators": None, "tensorrt_plugin": None}
    (lack,) = missing(report)["cpu"][0]
    assert lack == f"cpu_operators is not built (install g++, then {install_command()})"
    assert missing(report)["ort-cpu"] == ([], [])
    shown = call("doctor")
    assert shown.status == 0
    assert re.search(rf"^{re.escape(lack)} +run cpu$", shown.out, flags=re.M)


def test_an_unknown_instruction_set_in_the_environment_is_named() -> None:
    capped = environment() | {"MOEVLM_CPU_ISA": "sse9"}
    shown = subprocess.run([COMMAND, "doctor"], capture_output=True, text=True, env=capped)
    assert shown.returncode == 0
    assert re.search(r"^instructions +.*sse9", shown.stdout, flags=re.M)


def test_a_gpu_is_named_with_its_kind(tmp_path: Path) -> None:
    with fake_gpu(tmp_path, sm=(8, 9)):
        report, shown = examine(), call("doctor").out
    assert report.gpu is not None
    assert (report.gpu.sm, report.gpu_problem) == (89, "")
    assert "Fake GPU, sm89 (RTX 40, L4, L40S, RTX 6000 Ada)" in shown
    with fake_gpu(tmp_path, devices=0):
        assert "no NVIDIA GPU" in examine().gpu_problem


@pytest.mark.parametrize("probe", ["_processor", "_compiler", "instruction_set", "operators_path", "plugin_path"])
@pytest.mark.parametrize(
    "error", [OSError("x"), ValueError("x"), IndexError("x"), subprocess.TimeoutExpired("g++", 10)], ids=repr
)
def test_a_probe_that_fails_leaves_the_others(probe: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    if probe in doctor.__dict__ and probe.endswith("_path"):
        name = native.OPERATORS if probe == "operators_path" else native.PLUGIN
        monkeypatch.setitem(doctor._LIBRARIES, name, fail)
    else:
        monkeypatch.setattr(doctor, probe, fail)
    report = json.loads(call("doctor", "--json").out)
    assert report["schema"] == "moevlm.doctor/1"
    assert report["cores"] == cores()
