"""The memory of all pages of keys and values: one piece, in which every cache of a layer lies whole."""

from __future__ import annotations

import math
from itertools import groupby

from moevlm.runtime.backends.tensorrt.cuda import ALIGNMENT, Device
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.states import PagedKV, StateSpec

MOST_PITCH = (1 << 31) - 1  # bytes from a row to the next, in a copy of rows
Bindings = dict[str, tuple[int, tuple[int, ...]]]  # address and shape


class PageMemory:
    """[pages, kv_heads, page_size, W] of each cache. Made and freed inside the device's context.

    Nothing is cleared: kernels read of a page what its sequence has written, and of page 0, which padding writes
    into, nothing that anybody waits for.
    """

    def __init__(self, device: Device, states: tuple[StateSpec, ...], pages: int, page_size: int) -> None:
        """Raises EngineError if there is too little memory."""
        self._device = device
        self.pages = pages
        self._places: dict[str, int] = {}
        self._page_bytes: dict[str, int] = {}
        shapes, end = cache_shapes(states, page_size), 0
        for name, (dtype, shape) in shapes.items():
            self._places[name] = end
            self._page_bytes[name] = size = math.prod(shape) * DTYPES[dtype].bytes
            end += _aligned(pages * size)
        try:
            self._memory = device.allocate(max(end, ALIGNMENT))
        except EngineError as error:
            raise EngineError(f"no memory for {pages} pages of {page_size} tokens: {error}") from error
        self.caches: Bindings = {
            name: (self._memory.address + self._places[name], (pages, *shape)) for name, (_, shape) in shapes.items()
        }
        # Caches that are alike, one after the other, are rows of one copy.
        self._runs = [
            (self._places[names[0]], size, _aligned(pages * size), len(names))
            for size, run in groupby(shapes, self._page_bytes.__getitem__)
            for names in [list(run)]
        ]

    def copy(self, source: int, target: int) -> None:
        """Queue a copy of a page in all layers."""
        for place, size, pitch, count in self._runs:
            first = self._memory.address + place
            if count > 1 and pitch <= MOST_PITCH:
                self._device.copy_rows_within(first + target * size, pitch, first + source * size, pitch, size, count)
            else:
                for at in range(first, first + count * pitch, pitch):
                    self._device.copy_within(at + target * size, at + source * size, size)

    def free(self) -> None:
        self._memory.free()


def cache_shapes(states: tuple[StateSpec, ...], page_size: int) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """(dtype, [kv_heads, page_size, W] of a page) of every cache, by the name of the engine's input.

    Quantized caches are bytes, a float32 scale of each token and head among them. Raises EngineError for a state that
    no page holds.
    """
    shapes: dict[str, tuple[str, tuple[int, int, int]]] = {}
    for state in states:
        if not isinstance(state, PagedKV):
            raise EngineError(f"the engine keeps {state.tensor} (supported: keys and values)")
        dtype = "int8" if DTYPES[state.dtype].bytes == 1 else state.dtype
        shapes |= {name: (dtype, (state.kv_heads, page_size, width)) for name, width in state.widths.items()}
    return shapes


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
