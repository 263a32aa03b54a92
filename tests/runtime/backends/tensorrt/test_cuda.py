"""Calls of the CUDA driver: what they say where there is none, and that the fakes have nothing that is not real."""

from __future__ import annotations

import ctypes.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import driver as real

from moevlm.runtime.backends.tensorrt.cuda import Device
from moevlm.runtime.backends.tensorrt.driver import Gpu, find_gpu
from moevlm.runtime.core.errors import EngineError
from tests.support.fakes.cuda_driver import Driver

ROOT = Path(__file__).parents[4]


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="this machine has an NVIDIA driver")
def test_without_a_driver_the_real_bindings_give_one_line() -> None:
    with pytest.raises(EngineError, match="no NVIDIA GPU: its driver, libcuda, was not found"):
        find_gpu()


def test_without_bindings_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(EngineError, match=r"cuda-bindings is not installed \(pip install .*\[rtx\]'\)"):
        find_gpu()


def test_without_a_device_it_says_so(driver) -> None:
    driver.devices = 0
    with pytest.raises(EngineError, match="no NVIDIA GPU that this process may use"):
        Device()
    assert not driver.leaks()


def test_the_first_gpu_is_described(driver) -> None:
    driver.sm = (12, 1)
    assert find_gpu() == Gpu("Fake GPU", 121, 13000)


def test_what_is_copied_in_comes_out(device) -> None:
    host, memory = device.allocate_host(1000), device.allocate(1000)
    values = np.random.default_rng(1).integers(0, 256, 1000, np.uint8)
    host.array[:] = values
    device.copy_in(memory.address, host.address, 1000)
    device.synchronize()
    host.array[:] = 0
    device.copy_out(host.address, memory.address + 100, 900)
    device.synchronize()
    np.testing.assert_array_equal(host.array[:900], values[100:])
    device.clear(memory.address, memory.size)
    device.copy_out(host.address, memory.address, 1000)
    device.synchronize()
    assert not host.array.any()
    for buffer in (host, memory, host, memory):
        buffer.free()


def test_recorded_work_runs_when_it_is_launched_with_what_is_there_then(device) -> None:
    host, memory, result = device.allocate_host(4), device.allocate(4), device.allocate_host(4)

    def work() -> None:
        device.copy_in(memory.address, host.address, 4)
        device.copy_out(result.address, memory.address, 4)

    result.array[:] = 0
    graph = device.capture(work)
    device.synchronize()
    assert not result.array.any()
    for value in (3, 7):
        host.array[:] = value
        graph.launch()
        device.synchronize()
        assert (result.array == value).all()
    for owner in (graph, graph, host, memory, result):
        owner.free()


def test_what_cannot_be_recorded_is_an_error_and_leaves_the_stream_usable(device) -> None:
    with pytest.raises(EngineError, match="cuMemAlloc failed: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        device.capture(lambda: device.allocate(8))
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 / 0)
    device.allocate(8).free()
    device.synchronize()


def test_too_little_memory_says_how_much_there_is(device, driver) -> None:
    driver.total = 3_000_000_000
    with pytest.raises(
        EngineError, match=r"CUDA_ERROR_OUT_OF_MEMORY \(out of memory\): 5.00 GB wanted, 3.00 of 3.00 GB free on Fake"
    ):
        device.allocate(5_000_000_000)


def test_mapped_memory_is_the_host_s_and_kernels_see_what_is_written_there(device, driver) -> None:
    memory = device.allocate_mapped(1000)
    assert memory.device_address not in (0, memory.address)
    memory.array[:] = np.random.default_rng(2).integers(0, 256, 1000, np.uint8)
    np.testing.assert_array_equal(driver.view(memory.device_address + 10, 900), memory.array[10:910])
    assert not driver.device
    memory.free()
    memory.free()
    with pytest.raises(AssertionError, match="not inside an allocation"):
        driver.view(memory.device_address, 1)


def test_too_little_host_memory_says_how_much_is_wanted(device, driver) -> None:
    driver.host_total = 1000
    wanted = (
        "cuMemHostAlloc failed: CUDA_ERROR_OUT_OF_MEMORY (out of memory): 0.50 GB of the host's memory wanted, pinned"
    )
    with pytest.raises(EngineError, match=re.escape(wanted)):
        device.allocate_mapped(500_000_000)


def test_mapped_memory_without_an_address_for_kernels_is_given_back(device, driver) -> None:
    driver.faults.fail = "cuMemHostGetDevicePointer", 0
    with pytest.raises(EngineError, match="cuMemHostGetDevicePointer failed"):
        device.allocate_mapped(1000)
    assert not driver.host


def test_calls_outside_of_the_context_fail(driver) -> None:
    device = Device()
    with pytest.raises(EngineError, match="cuMemHostAlloc failed: CUDA_ERROR_INVALID_CONTEXT"):
        device.allocate_host(8)
    device.close()
    assert not driver.leaks()


def test_the_fake_driver_has_the_signatures_of_the_real_one() -> None:
    names = [name for name in dir(Driver) if name.startswith(("cu", "CU"))]
    assert len(names) > 30
    for name in names:
        if name.startswith("cu"):
            ours, theirs = (inspect.signature(getattr(owner, name)).parameters for owner in (Driver, real))
            assert list(ours)[1:] == list(theirs), name
        else:
            assert getattr(Driver, name) is getattr(real, name)


def test_the_fake_tensorrt_has_nothing_that_the_real_one_lacks() -> None:
    command = [sys.executable, "-m", "tests.support.fakes.names"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("1.7."), done.stdout
