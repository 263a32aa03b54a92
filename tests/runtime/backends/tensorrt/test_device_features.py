"""Features in device memory: their values on the host, and slices of several side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from moevlm.runtime.backends.tensorrt.cuda import Device
from moevlm.runtime.backends.tensorrt.device_features import DeviceFeatures, FeatureLayout, FeatureMemory
from moevlm.runtime.engine.visual import FeatureRows
from tests.support.fakes.cuda_driver import Driver

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
HIDDEN = 6


@pytest.fixture(params=[(name, levels) for name in DTYPES for levels in (0, 3)], ids=str)
def memory(request: pytest.FixtureRequest, driver: Driver) -> Iterator[FeatureMemory]:
    device = Device()
    dtype, levels = request.param
    found = FeatureMemory(device, FeatureLayout(HIDDEN, levels, dtype), threading.RLock())
    yield found
    with device:
        found.close()
    device.close()
    assert not driver.leaks()


def made(memory: FeatureMemory, driver: Driver, rows: int, seed: int) -> tuple[DeviceFeatures, np.ndarray]:
    """Features and their values, [1 + levels, rows, HIDDEN]."""
    layout = memory.layout
    values = np.random.default_rng(seed).standard_normal((1 + layout.levels, rows, HIDDEN)).astype(DTYPES[layout.dtype])
    with memory.device:
        features = memory.allocate(rows)
    for address, part in ((features.embeds[0], values[0]), (features.levels[0], values[1:])):
        if part.size:
            driver.view(address, part.nbytes)[:] = part.ravel().view(np.uint8)
            driver.space.wrote(address, part.nbytes)
    return features, values.astype(np.float32)


def test_values_come_to_the_host_in_float32(memory: FeatureMemory, driver: Driver) -> None:
    features, values = made(memory, driver, 5, 0)
    host = features.to_host()
    np.testing.assert_array_equal(host.embeds, values[0])
    np.testing.assert_array_equal(host.deepstack, values[1:])
    assert (features.rows, host.deepstack.shape) == (5, (memory.layout.levels, 5, HIDDEN))


def test_slices_lie_side_by_side_level_by_level(memory: FeatureMemory, driver: Driver) -> None:
    first, ones = made(memory, driver, 5, 1)
    second, others = made(memory, driver, 4, 2)
    slices = [FeatureRows(first, 2, 5), FeatureRows(second, 0, 1), FeatureRows(second, 3, 4)]
    with memory.device:
        target = memory.allocate(5)
        memory.copy(slices, target.address)
    expected = np.concatenate([ones[:, 2:5], others[:, :1], others[:, 3:]], axis=1)
    host = target.to_host()
    np.testing.assert_array_equal(host.embeds, expected[0])
    np.testing.assert_array_equal(host.deepstack, expected[1:])


def test_parts_have_memory_of_their_own(memory: FeatureMemory, driver: Driver) -> None:
    whole, values = made(memory, driver, 6, 3)
    assert whole.split([6]) == [whole]
    parts = whole.split([1, 3, 2])
    del whole
    assert len(driver.device) == 3
    assert sum(part.nbytes for part in parts) == sum(map(len, driver.device.values()))
    hosts = [part.to_host() for part in parts]
    np.testing.assert_array_equal(np.concatenate([host.embeds for host in hosts]), values[0])
    np.testing.assert_array_equal(np.concatenate([host.deepstack for host in hosts], axis=1), values[1:])
    del parts
    assert not driver.device
