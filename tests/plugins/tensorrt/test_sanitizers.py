"""The plugin library and its harness under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=vptr"


def runtime(name: str) -> str:
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ has no {name}")
    return path


@pytest.mark.skipif("MOEVLM_SANITIZED" in os.environ, reason="this is the process with sanitizers")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the plugins with")
def test_plugins_pass_their_tests_under_sanitizers() -> None:
    environment = os.environ | {
        "MOEVLM_SANITIZED": "1",
        "CXXFLAGS": FLAGS,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    folder = Path(__file__).parent
    tests = [folder / "test_plugin.py", folder / "test_program_bytes.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
