"""Every instruction set that this machine has: the operators' tests with the dispatcher capped to each lower one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moevlm.runtime.backends.libraries import instruction_set, operators_path
from tests.support.cpu_kernels import INSTRUCTION_SETS

ROOT = Path(__file__).parents[3]
NAME = "from moevlm.runtime.backends.libraries import instruction_set; print(instruction_set())"
# Of each operator what reaches all of its kernels, and engines made of them against transformers.
TESTS = (
    "tests/plugins/cpu/test_paged_attention.py",
    "tests/plugins/cpu/test_gated_delta.py",
    "tests/plugins/cpu/test_matmul_ops.py",
    "tests/export/backends/cpu/test_passes.py",
    "tests/export/backends/cpu/test_row_independence.py",
    "tests/export/parity/test_run.py",
)
ATTENTION = "head_size or any_shape or any_mixture or nan or threads"
DELTA = "with_the_spec or head_sizes"
CHOSEN = f"{ATTENTION} or {DELTA} or test_matmul_ops or test_passes or images_among or quantized_engines"


def python(cap: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MOEVLM_CPU_ISA": cap}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lower() -> list[str]:
    """Those below the one in use; avx512 has attention's kernels of avx512_vnni and the others' of avx2."""
    names = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(instruction_set())]
    return [name for name in names if name != "avx512"]


@pytest.mark.parametrize("cap", lower())
def test_operators_and_engines_of_a_lower_instruction_set(cap: str, tmp_path: Path) -> None:
    assert python(cap, "-c", NAME).stdout.strip() == cap
    options = ("-q", "-x", "--no-header", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "tests"))
    done = python(cap, "-m", "pytest", *options, *TESTS, "-k", CHOSEN)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "float32", "int8"), [("baseline", 4, 8), ("avx2", 8, 32), ("avx512", 16, 64), ("avx512_vnni", 16, 64)]
)
def test_peak_in_bytes_is_that_of_instructions_for_bytes(name: str, float32: int, int8: int) -> None:
    """A round is ten instructions, or pairs of them: as many multiply-adds as their vectors hold."""
    library, number = ctypes.CDLL(str(operators_path())), INSTRUCTION_SETS.index(name)
    found = [f(number, 1) / 10 for f in (library.moevlm_peak_float32, library.moevlm_peak_int8)]
    absent = found == [0, 0] and number > INSTRUCTION_SETS.index(instruction_set())
    assert absent or found == [float32, int8]


def test_the_best_is_taken_without_a_cap() -> None:
    assert python("", "-c", NAME).stdout.strip() in INSTRUCTION_SETS


def test_an_unknown_cap_is_refused_by_name() -> None:
    done = python("avx3", "-c", NAME)
    message = 'MOEVLM_CPU_ISA = "avx3" (allowed: baseline, avx2, avx512, avx512_vnni)'
    assert done.stdout.endswith(f"unsupported value in the environment: {message}\n")
    # ONNX Runtime says so too, to whoever loads the library there.
    load = "import onnxruntime as o; from moevlm.runtime.backends.libraries import *;"
    done = python("avx3", "-c", f"{load} o.SessionOptions().register_custom_ops_library(str(operators_path()))")
    assert f"moevlm.cpu: {message}" in done.stdout
