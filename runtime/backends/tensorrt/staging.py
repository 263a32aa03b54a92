"""The arrays of one call to a GPU engine: pinned on the host, mirrored on the device, moved in one copy each way."""

import math
from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import ALIGNMENT, Device, DeviceMemory, HostMemory
from moevlm.runtime.core.errors import EngineError

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype of each array, by name


class Staging:
    """Inputs first, then outputs. It grows with the calls; as long as shapes stay, so do all addresses."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._host: HostMemory | None = None
        self._memory: DeviceMemory | None = None
        self._layouts: tuple[Layout, Layout] = ({}, {})
        self._inputs_end = self._end = 0
        self.arrays: dict[str, np.ndarray] = {}
        self.addresses: dict[str, int] = {}

    def arrange(self, inputs: Layout, outputs: Layout) -> None:
        """Make room. `arrays` are the host's, `addresses` the device's; what they held before is lost."""
        if self._layouts == (inputs, outputs):
            return
        offsets: dict[str, int] = {}
        end = 0
        for layout in (inputs, outputs):
            for name, (shape, dtype) in layout.items():
                offsets[name] = end
                end = _aligned(end + math.prod(shape) * dtype.itemsize)
            if layout is inputs:
                self._inputs_end = end
        self._end = end
        if self._host is None or self._host.size < end:
            self.free()
            self._host = self._device.allocate_host(max(end, ALIGNMENT))
            try:
                self._memory = self._device.allocate(self._host.size)
            except EngineError:
                self.free()
                raise
        assert self._memory is not None  # it comes and goes with the host's
        self.arrays, self.addresses = {}, {}
        for name, (shape, dtype) in (*inputs.items(), *outputs.items()):
            begin, size = offsets[name], math.prod(shape) * dtype.itemsize
            self.arrays[name] = self._host.array[begin : begin + size].view(dtype).reshape(shape)
            self.addresses[name] = self._memory.address + begin
        self._layouts = dict(inputs), dict(outputs)

    def copy_in(self) -> None:
        """Queue the copy of all inputs."""
        if self._host is not None and self._memory is not None and self._inputs_end:
            self._device.copy_in(self._memory.address, self._host.address, self._inputs_end)

    def copy_out(self) -> None:
        """Queue the copy of all outputs."""
        if self._host is not None and self._memory is not None and self._end > self._inputs_end:
            begin = self._inputs_end
            self._device.copy_out(self._host.address + begin, self._memory.address + begin, self._end - begin)

    def free(self) -> None:
        """Nothing that was queued may still use it."""
        self.arrays, self.addresses, self._layouts = {}, {}, ({}, {})
        with ExitStack() as stack:
            for memory in (self._host, self._memory):
                if memory is not None:
                    stack.callback(memory.free)
            self._host = self._memory = None


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
