"""The plugin library, compiled for these tests to use the recording CUDA driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from bench.plugin_harness import PluginLibrary, compile_harness, compile_library
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.tensorrt.fake_cuda import FakeCuda, compile_driver
from tests.support.simulator.bundle import TARGET, SimulatedBundle, with_simulated_engine
from tests.support.simulator.libraries import Libraries
from tests.support.simulator.run import Messages, Report, interpret


@pytest.fixture(scope="session")
def driver_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the plugins with")
    return compile_driver(tmp_path_factory.mktemp("driver") / "libcuda.so.1")


@pytest.fixture(scope="session")
def harness_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_harness(tmp_path_factory.mktemp("harness") / "harness.so")


@pytest.fixture(scope="session")
def libraries(driver_path: Path, harness_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    path = tmp_path_factory.mktemp("plugin") / "plugin.so"
    # The driver's full path: another library of this process may load the machine's own one by its name.
    return Libraries(compile_library(path, driver_path), harness_path, driver_path)


@pytest.fixture(scope="session")
def shared_library(libraries: Libraries) -> PluginLibrary:
    return PluginLibrary(libraries.plugins, libraries.harness)


@pytest.fixture(scope="session")
def simulated(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> SimulatedBundle:
    """The tiny bundle with a simulated engine, too. To be left as it is."""
    return with_simulated_engine(tiny_bundle, tiny_checkpoint, tmp_path_factory.mktemp("simulated"))


@pytest.fixture(scope="session")
def interpreted(
    libraries: Libraries, triton_interpreter: Interpreter, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[SimulatedBundle, Sequence[Messages], int], Report]:
    """Has a simulated engine answer all requests at once, so many tokens each, by interpreted kernels."""

    def run(bundle: SimulatedBundle, requests: Sequence[Messages], new_tokens: int) -> Report:
        folder = tmp_path_factory.mktemp("gpu")
        return triton_interpreter.call(interpret, bundle.path, TARGET, folder, libraries, requests, new_tokens)

    return run


@pytest.fixture(scope="session")
def shared_cuda(driver_path: Path) -> FakeCuda:
    return FakeCuda(driver_path)


@pytest.fixture
def library(shared_library: PluginLibrary) -> PluginLibrary:
    shared_library.set_logger(11)
    shared_library.messages()
    return shared_library


@pytest.fixture
def cuda(shared_cuda: FakeCuda) -> Iterator[FakeCuda]:
    shared_cuda.reset()
    before = shared_cuda.loaded()
    yield shared_cuda
    assert shared_cuda.loaded() == before, "a module was left loaded"
