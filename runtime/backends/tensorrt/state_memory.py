"""The memory of what sequences keep: all pages of keys and values, and all rows of recurrent states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby

from moevlm.runtime.backends.tensorrt.cuda import ALIGNMENT, Device
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.states import PagedKV, Recurrent, StateSpec
from moevlm.runtime.engine.step import Step

MOST_PITCH = (1 << 31) - 1  # bytes from a row to the next, in a copy of rows
Bindings = dict[str, tuple[int, tuple[int, ...]]]  # address and shape
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype, and shape of a page or row, by the engine's input


class Pool:
    """[count, *shape] of each tensor: one piece of memory, in which every tensor lies whole.

    Made and freed inside the device's context. Nothing is cleared by that.
    """

    def __init__(self, device: Device, shapes: Shapes, count: int, what: str) -> None:
        """what: that is counted, in words. Raises EngineError if there is too little memory."""
        self._device = device
        self._bytes = {name: math.prod(shape) * DTYPES[dtype].bytes for name, (dtype, shape) in shapes.items()}
        self._places: dict[str, int] = {}
        end = 0
        order = sorted(shapes, key=self._bytes.__getitem__)
        for name in order:
            self._places[name] = end
            end += _aligned(count * self._bytes[name])
        try:
            self._memory = device.allocate(max(end, ALIGNMENT))
        except EngineError as error:
            raise EngineError(f"no memory for {count} {what}: {error}") from error
        self.tensors: Bindings = {
            name: (self._memory.address + self._places[name], (count, *shape)) for name, (_, shape) in shapes.items()
        }
        # Tensors of one size, one after the other, are rows of one copy.
        self._runs = [
            (self._places[names[0]], size, _aligned(count * size), len(names))
            for size, run in groupby(order, self._bytes.__getitem__)
            for names in [list(run)]
        ]

    def copy(self, source: int, target: int) -> None:
        """Queue a copy of a page or row in all layers."""
        for place, size, pitch, count in self._runs:
            first = self._memory.address + place
            if count > 1 and pitch <= MOST_PITCH:
                self._device.copy_rows_within(first + target * size, pitch, first + source * size, pitch, size, count)
            else:
                for at in range(first, first + count * pitch, pitch):
                    self._device.copy_within(at + target * size, at + source * size, size)

    def clear(self, target: int) -> None:
        """Queue zeros in a page or row of all layers."""
        for name, size in self._bytes.items():
            self._device.clear(self._memory.address + self._places[name] + target * size, size)

    def free(self) -> None:
        self._memory.free()


class StateMemory:
    """Pages of keys and values, and rows of recurrent states. Made and freed inside the device's context.

    Kernels read of a page what its sequence has written. Of page 0 and row 0, which padding has, nobody waits for
    anything. tensors: every input of the engine that is kept, by name.
    """

    def __init__(self, device: Device, states: tuple[StateSpec, ...], pages: int, rows: int, page_size: int) -> None:
        """rows: 0 for a model without recurrent states. Raises EngineError if there is too little memory."""
        self.size = pages, rows
        self._pages = Pool(device, page_shapes(states, page_size), pages, f"pages of {page_size} tokens")
        self._rows: Pool | None = None
        if rows:
            try:
                self._rows = Pool(device, row_shapes(states), rows, "rows of recurrent states")
            except EngineError:
                self._pages.free()
                raise
        self.tensors = self._pages.tensors | (self._rows.tensors if self._rows else {})

    def prepare(self, step: Step) -> None:
        """Queue what a step asks for before it: pages and rows that are copied, rows that are cleared."""
        for source, target in step.copies:
            self._pages.copy(source, target)
        if self._rows is None:
            return
        for row in step.cleared:
            self._rows.clear(row)
        for source, target in step.row_copies:
            self._rows.copy(source, target)

    def free(self) -> None:
        try:
            if self._rows is not None:
                self._rows.free()
        finally:
            self._pages.free()


def page_shapes(states: tuple[StateSpec, ...], page_size: int) -> Shapes:
    """(dtype, [kv_heads, page_size, W] of a page) of every cache.

    Quantized caches are bytes, a float32 scale of each token and head among them.
    """
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for state in states:
        if isinstance(state, PagedKV):
            dtype = "int8" if DTYPES[state.dtype].bytes == 1 else state.dtype
            shapes |= {name: (dtype, (state.kv_heads, page_size, width)) for name, width in state.widths.items()}
    return shapes


def row_shapes(states: tuple[StateSpec, ...]) -> Shapes:
    """(dtype, shape of a row) of every recurrent state."""
    return {state.tensor: (state.dtype, state.shape) for state in states if isinstance(state, Recurrent)}


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
