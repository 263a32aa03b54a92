"""A fake CUDA driver and a fake GPU, which have to be left as they were found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moevlm.runtime.backends.tensorrt.cuda import Device
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.loading import load_runtime
from tests.support.fakes.cuda_driver import Driver
from tests.support.fakes.gpu import TARGET, FakeGpu, fake_gpu


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    return fake


@pytest.fixture
def device(driver: Driver) -> Iterator[Device]:
    """Current."""
    opened = Device()
    with opened:
        yield opened
    opened.close()
    opened.close()
    assert not driver.leaks()


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[FakeGpu]:
    with fake_gpu(tmp_path) as found:
        yield found


@pytest.fixture
def runtime(bundle: Path, gpu: FakeGpu) -> Iterator[Runtime]:
    """bundle: a fixture of the test's own file."""
    with load_runtime(bundle, TARGET) as loaded:
        yield loaded
    assert not gpu.held()
