"""The installed plugin library: what it needs of a machine, and what it says where that is missing."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moevlm.runtime.backends.libraries import plugin_path

ROOT = Path(__file__).parents[3]
EXECUTION = """
import ctypes, sys
from pathlib import Path
from bench.plugin_harness import Io, PluginError, PluginLibrary
from tests.plugins.tensorrt.programs import router_program

library, harness, driver = sys.argv[1:]
if driver:
    from tests.plugins.tensorrt.fake_cuda import FakeCuda
    cuda = FakeCuda(Path(driver))
program = router_program()
plugin = PluginLibrary(Path(library), Path(harness)).plugin(program.op, program.to_bytes())
io = Io.of(program.inputs, program.outputs, {"T": 5})
try:
    plugin.shape_change(io)
except PluginError as error:
    sys.exit(str(error))
plugin.enqueue(io, [1 << 20, 2 << 20], [3 << 20, 4 << 20], 0)
print([event.call for event in cuda.events()])
"""


def execute(harness: Path, driver: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", EXECUTION, plugin_path(), harness, driver]
    return subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)


def test_driver_is_found_by_its_name(harness_path: Path, driver_path: Path) -> None:
    done = execute(harness_path, str(driver_path), {"LD_LIBRARY_PATH": str(driver_path.parent)})
    assert (done.returncode, done.stdout) == (0, "['cuModuleLoadData', 'cuLaunchKernel']\n"), done.stderr


def test_missing_driver_is_named(harness_path: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        done = execute(harness_path, "", {})
        missing = "libcuda.so.1: cannot open shared object file: No such file or directory"
        assert (done.returncode, done.stderr) == (1, f"MoERouter: no NVIDIA driver: {missing}\n")
    else:
        pytest.skip("this machine has an NVIDIA driver")


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_library_needs_nothing_of_nvidia_and_shows_three_functions() -> None:
    dynamic = subprocess.run(["readelf", "-dW", plugin_path()], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].split(".so")[0] for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert {name for name in needed if not name.startswith("ld-")} <= {"libstdc++", "libm", "libgcc_s", "libc"}
    symbols = subprocess.run(["nm", "-D", "--defined-only", plugin_path()], capture_output=True, text=True, check=True)
    functions = {line.split()[2] for line in symbols.stdout.splitlines() if line.split()[1] == "T"}
    assert functions == {"getCreators", "setLoggerFinder", "moevlm_plugin_error"}
