"""The library's own declarations of TensorRT's interface and of CUDA's driver, held to the official headers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "plugins" / "tensorrt"


def cuda_headers() -> list[Path]:
    """Of a toolkit, or of Triton, which brings some along."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    if triton := importlib.util.find_spec("triton"):
        folders += [Path(each) / "backends/nvidia/include" for each in triton.submodule_search_locations or ()]
    return [folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the check with")
def test_declarations_are_those_of_tensorrts_headers(tmp_path: Path) -> None:
    folders = [Path(os.environ["TENSORRT_INCLUDE"])] if "TENSORRT_INCLUDE" in os.environ else []
    include = [flag for folder in (*folders, *cuda_headers()[:1], SOURCES) for flag in ("-isystem", folder)]
    found = [
        "g++",
        "-std=c++17",
        *include,
        "-E",
        "-x",
        "c++",
        "-include",
        "NvInferRuntime.h",
        "/dev/null",
        "-o",
        os.devnull,
    ]
    if subprocess.run(found, capture_output=True).returncode:
        pytest.skip("no NvInferRuntime.h (set TENSORRT_INCLUDE to a folder of TensorRT's headers)")
    program = tmp_path / "abi_check"
    source = Path(__file__).with_name("abi_check.cpp")
    subprocess.run(["g++", "-std=c++17", "-w", *include, source, "-o", program], check=True)
    checked = subprocess.run([program], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the check with")
@pytest.mark.skipif(not cuda_headers(), reason="no cuda.h (of a CUDA toolkit, or of Triton)")
def test_declarations_are_those_of_cudas_header() -> None:
    include = [flag for folder in (cuda_headers()[0], SOURCES) for flag in ("-isystem", folder)]
    source = Path(__file__).with_name("driver_check.cpp")
    command = ["g++", "-std=c++17", "-fsyntax-only", *include, source]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
