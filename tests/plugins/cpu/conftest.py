"""The CPU kernels, compiled once for all tests of them."""

from __future__ import annotations

import ctypes
import shutil

import pytest

from tests.support.cpu_kernels import INSTRUCTION_SETS, Kernels, compile_kernels


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")
    return ctypes.CDLL(str(compile_kernels(tmp_path_factory.mktemp("kernels") / "kernels.so")))


# The byte products of avx512 are those of avx2.
@pytest.fixture(scope="session", params=[name for name in INSTRUCTION_SETS if name != "avx512"])
def kernels(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Kernels:
    kernels = Kernels(library, request.param, threads=2)
    if not kernels.available():
        pytest.skip(f"this processor has no {request.param}")
    return kernels
