"""The operator library under AddressSanitizer and UndefinedBehaviorSanitizer, with each instruction set there is."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.cpu.test_instruction_sets import lower
from tests.support.cpu_kernels import CPU, compile_library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the operators with")

ROOT = Path(__file__).parents[3]
FLAGS = ["-O1", "-g1", "-fno-math-errno", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EXAMPLES = 1000
# Python and ONNX Runtime keep memory until they end.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("sanitized") / "operators.so", sorted(CPU.rglob("*.cpp")), FLAGS)


def preloaded() -> str:
    """The sanitizers' own libraries: an interpreter without them cannot load what was built with them."""
    compiler = os.environ.get("CXX", "g++")
    return " ".join(
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )


def sanitized(library: Path, cap: str, examples: int, seed: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | OPTIONS | {"MOEVLM_CPU_ISA": cap, "LD_PRELOAD": preloaded()}
    command = [sys.executable, "-m", "tests.support.random_operators", library, str(examples), str(seed)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("cap", [*lower(), ""], ids=lambda cap: cap or "best")
def test_random_nodes_touch_no_memory_but_their_own(library: Path, cap: str) -> None:
    seed = random.randrange(2**32)
    done = sanitized(library, cap, EXAMPLES, seed)
    lines = [line[:2000] for line in done.stdout.splitlines()]
    found = [i for i, line in enumerate(lines) if "ERROR: " in line or "runtime error: " in line or "Traceback" in line]
    first = max(found[0] - 2, 0) if found else -40  # with the node before it
    assert done.returncode == 0, f"seed {seed}\n" + "\n".join(lines[first:][:60])
    assert len(lines) > EXAMPLES * 0.9  # each says what it was
