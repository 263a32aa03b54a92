"""States on a fake device: where each lies, what copies and clearing touch, and what page tables are copied."""

from __future__ import annotations

import numpy as np
import pytest

from moevlm.runtime.backends.tensorrt import state_memory
from moevlm.runtime.backends.tensorrt.decode_step import sizes
from moevlm.runtime.backends.tensorrt.page_tables import PageTables
from moevlm.runtime.backends.tensorrt.state_memory import Pool, StateMemory, page_shapes, row_shapes
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.states import PagedKV, Recurrent
from moevlm.runtime.engine.step import Step
from tests.support.fakes.cuda_driver import CopiedRows

PAGES, SIZE = 5, 8
DELTA = tuple(
    Recurrent(layer=layer, name=name, shape=shape)
    for layer in (3, 4)
    for name, shape in (("conv", (3, 20)), ("delta", (2, 8, 4)))
)
ALIKE = tuple(PagedKV(layer=i, kv_heads=2, key_dim=8, value_dim=8, dtype="bfloat16") for i in range(3))
WIDER = PagedKV(layer=3, kv_heads=1, key_dim=24, value_dim=4, dtype="float16")
LATENT = PagedKV(layer=3, kv_heads=1, key_dim=40, value_dim=32, value_in_key=True, dtype="int8")


def test_caches_lie_whole_and_apart_in_one_piece_of_memory(device, driver) -> None:
    memory = StateMemory(device, (*ALIKE, LATENT), PAGES, 0, SIZE)
    assert list(memory.tensors) == [
        *(f"{part}_cache.{i}" for i in range(3) for part in ("key", "value")),
        "key_cache.3",
    ]
    assert memory.tensors["key_cache.1"][1] == (PAGES, 2, SIZE, 8)
    assert memory.tensors["key_cache.3"][1] == (PAGES, 1, SIZE, 44)  # a scale beside 40 codes
    ((base, whole),) = driver.device.items()
    ends = base
    for name, (address, shape) in memory.tensors.items():
        assert address % 256 == 0
        assert address >= ends, name
        ends = address + int(np.prod(shape)) * (1 if name.endswith("3") else 2)
    assert ends <= base + len(whole)
    memory.free()


@pytest.mark.parametrize("pitch", [1 << 31, 1])
@pytest.mark.parametrize("states", [ALIKE, (*ALIKE, WIDER), (LATENT,)], ids=["alike", "one wider", "latent"])
def test_a_page_is_copied_in_all_layers_and_nothing_else_changes(device, driver, states, pitch, monkeypatch) -> None:
    monkeypatch.setattr(state_memory, "MOST_PITCH", pitch)
    memory = Pool(device, page_shapes(states, SIZE), PAGES, "pages")
    ((base, whole),) = driver.device.items()
    whole[:] = np.random.default_rng(0).integers(0, 255, len(whole))
    driver.space.wrote(base, len(whole))
    before = whole.copy()
    driver.faults.calls.clear()
    memory.copy(3, 1)
    device.synchronize()
    dtypes = page_shapes(states, SIZE)
    for name, (address, shape) in memory.tensors.items():
        size = int(np.prod(shape)) * np.dtype("int8" if dtypes[name][0] == "int8" else "uint16").itemsize
        pages = whole[address - base : address - base + size].reshape(PAGES, -1)
        expected = before[address - base : address - base + size].reshape(PAGES, -1).copy()
        expected[1] = expected[3]
        np.testing.assert_array_equal(pages, expected)
        before[address - base : address - base + size] = expected.ravel()
    np.testing.assert_array_equal(whole, before)
    rows, single = (driver.faults.calls.count(name) for name in ("cuMemcpy2DAsync", "cuMemcpyDtoDAsync"))
    alone = {ALIKE: 0, (*ALIKE, WIDER): 2, (LATENT,): 1}[states]
    assert (rows, single) == ((int(len(states) > 1), alone) if pitch > 1 else (0, len(memory.tensors)))
    memory.free()


def test_memory_for_too_many_pages_is_an_error_with_numbers(device, driver) -> None:
    driver.total = 100_000
    with pytest.raises(EngineError, match=r"^no memory for 99 pages of 8 tokens: cuMemAlloc failed: .* GB wanted"):
        StateMemory(device, ALIKE, 99, 0, SIZE)
    assert not driver.device
    with pytest.raises(EngineError, match=r"^no memory for 999 rows of recurrent states: cuMemAlloc failed: "):
        StateMemory(device, (*ALIKE, *DELTA), 9, 999, SIZE)
    assert not driver.device


def test_rows_are_cleared_and_copied_before_a_step_and_nothing_else_changes(device, driver) -> None:
    rows = 6
    memory = StateMemory(device, (*ALIKE, *DELTA), PAGES, rows, SIZE)
    views = {}
    for name, (address, shape) in memory.tensors.items():
        count, width = shape[0], int(np.prod(shape[1:])) * (4 if "_state" in name else 2)
        (base,) = (base for base, whole in driver.device.items() if base <= address < base + len(whole))
        views[name] = driver.device[base][address - base :][: count * width].reshape(count, width)
        views[name][:] = np.random.default_rng(0).integers(1, 255, views[name].shape)
        driver.space.wrote(address, count * width)
    assert {name: memory.tensors[name][1] for name in row_shapes(DELTA)} == {
        name: (rows, *state.shape) for state in DELTA for name in state.tensors
    }
    before = {name: view.copy() for name, view in views.items()}
    driver.faults.calls.clear()
    nothing = np.zeros(0, np.int32)
    copied = {"copies": ((3, 1),), "row_copies": ((4, 1), (3, 0))}
    memory.prepare(Step(nothing, nothing, {}, *[nothing] * 5, cleared=(2, 5), **copied))
    device.synchronize()
    for name, view in views.items():
        expected = before[name].copy()
        if name in row_shapes(DELTA):
            expected[[2, 5]] = 0
            expected[[1, 0]] = expected[[4, 3]]
        else:
            expected[1] = expected[3]
        np.testing.assert_array_equal(view, expected, name)
    # A run of caches, and of each kind of state one, for each copy.
    assert driver.faults.calls.count("cuMemcpy2DAsync") == 1 + 2 * 2
    memory.free()


def test_page_tables_lie_at_one_place_and_padding_has_page_0(device, driver) -> None:
    tables = PageTables(device, 4, 6)
    ((address, memory),) = driver.device.items()
    assert tables.address == address
    shown = memory.view(np.int32).reshape(4, 6)
    tables.write(np.array([[9, 8, 7], [6, 5, 4]], np.int32), 4)
    device.synchronize()
    assert shown.tolist() == [[9, 8, 7, 0, 0, 0], [6, 5, 4, 0, 0, 0], [0] * 6, [0] * 6]
    assert driver.copied_rows == [CopiedRows(24, 12, 4, on_device=False)]
    tables.write(np.full((1, 8), 3, np.int32), 2)  # wider than the context
    device.synchronize()
    assert shown[0].tolist() == [3] * 6
    assert shown[1, 0] == 0
    tables.free()


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (64, [1, 2, 4, 8, 16, 32, 64])]
)
def test_decode_steps_are_padded_to_powers_of_two_and_the_most(most, expected) -> None:
    assert sizes(most) == expected
