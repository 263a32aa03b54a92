"""Visual features in device memory, which their handles own: on their way to the decoder they never leave it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import ALIGNMENT, Device, DeviceMemory
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, VisualFeatures


@dataclass(frozen=True)
class FeatureLayout:
    """How features of V visual tokens lie in a piece of memory: embeds [V, H], then levels [L, V, H].

    dtype: as in numpy; the engine's.
    """

    hidden: int
    levels: int
    dtype: str

    @property
    def row(self) -> int:
        """Bytes of a row on one level."""
        return self.hidden * DTYPES[self.dtype].bytes

    def levels_at(self, rows: int) -> int:
        """Where the levels begin."""
        return -(-rows * self.row // ALIGNMENT) * ALIGNMENT

    def size(self, rows: int) -> int:
        """Bytes of it all."""
        return self.levels_at(rows) + self.levels * rows * self.row


class FeatureMemory:
    """All features that an engine keeps. Threads may share it; what queues work is called inside the device's context.

    Whoever drops a handle frees its memory, in any thread; `close` frees all.
    """

    def __init__(self, device: Device, layout: FeatureLayout, lock: threading.RLock) -> None:
        """lock: the engine's, under which work is queued."""
        self.device, self.layout = device, layout
        self.lock = lock
        self._held: dict[int, DeviceMemory] = {}  # by address
        # Not the engine's: a handle may be dropped while another thread waits for a step. Reentrant: a destructor comes
        # at any place.
        self._freeing = threading.RLock()

    def allocate(self, rows: int) -> DeviceFeatures:
        """Features that are not written yet. Raises EngineError."""
        memory = self.device.allocate(self.layout.size(rows))
        self._held[memory.address] = memory
        features = DeviceFeatures(self, memory.address, rows)
        weakref.finalize(features, self._drop, memory.address)
        return features

    def copy(self, slices: Sequence[FeatureRows], target: int) -> None:
        """Queue a copy of slices, one after the other, to a place that has room for features of so many rows.

        Raises EngineError for features of another engine, or of one that was closed.
        """
        layout, rows, at = self.layout, sum(one.rows for one in slices), 0
        for one in slices:
            features = self._own(one.features)
            width, first = one.rows * layout.row, one.start * layout.row
            self.device.copy_within(target + at, features.address + first, width)
            if layout.levels:
                levels = target + layout.levels_at(rows) + at
                source = features.address + layout.levels_at(features.rows) + first
                pitches = rows * layout.row, features.rows * layout.row
                self.device.copy_rows_within(levels, pitches[0], source, pitches[1], width, layout.levels)
            at += width

    def joined(self, parts: Sequence[DeviceFeatures]) -> DeviceFeatures:
        """The features of several calls in one piece of memory."""
        if len(parts) == 1:
            return parts[0]
        whole = self.allocate(sum(part.rows for part in parts))
        self.copy([FeatureRows.all_of(part) for part in parts], whole.address)
        self.device.synchronize()  # before the parts go
        return whole

    def require_open(self, features: DeviceFeatures) -> None:
        """Raises EngineError after `close`."""
        if features.address not in self._held:
            raise EngineError("the engine of these visual features was closed")

    def close(self) -> None:
        """Free all; nothing that was queued may still use it."""
        with self._freeing:
            while self._held:
                self._held.popitem()[1].free()

    def _own(self, features: VisualFeatures) -> DeviceFeatures:
        if not isinstance(features, DeviceFeatures) or features.memory is not self:
            raise EngineError("visual features of another engine (allowed: those that this one has encoded)")
        self.require_open(features)
        return features

    def _drop(self, address: int) -> None:
        with self._freeing:
            memory = self._held.pop(address, None)
            # Where the driver fails every call fails, and the next one says so.
            if memory is not None:
                with suppress(EngineError), self.device:
                    memory.free()


class DeviceFeatures:
    """See VisualFeatures. address: of the first row."""

    def __init__(self, memory: FeatureMemory, address: int, rows: int) -> None:
        self.memory, self.address, self._rows = memory, address, rows

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def nbytes(self) -> int:
        return self.memory.layout.size(self._rows)

    @property
    def embeds(self) -> tuple[int, tuple[int, int]]:
        """Address and shape."""
        return self.address, (self._rows, self.memory.layout.hidden)

    @property
    def levels(self) -> tuple[int, tuple[int, int, int]]:
        """Address and shape."""
        layout = self.memory.layout
        return self.address + layout.levels_at(self._rows), (layout.levels, self._rows, layout.hidden)

    def split(self, rows: Sequence[int]) -> list[VisualFeatures]:
        """See VisualFeatures. Raises EngineError."""
        if len(rows) == 1:
            return [self]
        parts: list[VisualFeatures] = []
        with self.memory.lock:
            self.memory.require_open(self)
            with self.memory.device:
                start = 0
                for count in rows:
                    part = self.memory.allocate(count)
                    self.memory.copy([FeatureRows(self, start, start + count)], part.address)
                    parts.append(part)
                    start += count
                self.memory.device.synchronize()  # before this one goes
        return parts

    def to_host(self) -> HostFeatures:
        """See VisualFeatures. Raises EngineError."""
        layout, device = self.memory.layout, self.memory.device
        with self.memory.lock:
            self.memory.require_open(self)
            with device:
                host = device.allocate_host(self.nbytes)
                try:
                    device.copy_out(host.address, self.address, self.nbytes)
                    device.synchronize()
                    data = host.array.copy()
                finally:
                    host.free()
        values = _float32(data, layout.dtype)
        first, start = self._rows * layout.hidden, layout.levels_at(self._rows) // DTYPES[layout.dtype].bytes
        shape = layout.levels, self._rows, layout.hidden
        return HostFeatures(values[:first].reshape(shape[1:]), values[start:].reshape(shape))


def _float32(data: np.ndarray, dtype: str) -> np.ndarray:
    """Values of bytes. dtype: bfloat16, which numpy does not know, float16 or float32."""
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(dtype).astype(np.float32)
