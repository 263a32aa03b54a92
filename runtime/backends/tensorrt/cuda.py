"""What an engine needs of a GPU: its memory, copies, marks in a stream, recorded work; each call is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from moevlm.runtime.backends.tensorrt.driver import call, find_gpu, load_driver
from moevlm.runtime.core.errors import EngineError

ALIGNMENT = 256  # of what is bound to TensorRT


class Device:
    """The primary context of the first GPU, one stream of it, and memory. `with device:` makes it the thread's.

    Every method but `close` is called inside of that. Raises EngineError where a call of the driver fails.
    """

    def __init__(self) -> None:
        self.gpu = find_gpu()  # first: without a device some libraries crash instead of failing
        self._driver = load_driver()
        self._device = self._call("cuDeviceGet", 0)
        self._stream: Any = None
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        try:
            with self:
                # Not ordered after the default stream, on which other libraries in the process may work.
                flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
                self._stream = self._call("cuStreamCreate", flags)
        except EngineError:
            self.close()
            raise

    @property
    def stream(self) -> int:
        return int(self._stream)

    def __enter__(self) -> Device:
        self._call("cuCtxPushCurrent", self._context)
        return self

    def __exit__(self, *_: object) -> None:
        self._call("cuCtxPopCurrent")

    def close(self) -> None:
        """Give back the stream and the context; memory must have been freed before."""
        if self._context is None:
            return
        with ExitStack() as stack:
            stack.callback(self._call, "cuDevicePrimaryCtxRelease", self._device)
            stack.enter_context(self)
            if self._stream is not None:
                self._call("cuStreamDestroy", self._stream)
        self._context = self._stream = None

    def allocate(self, size: int) -> DeviceMemory:
        """`size` bytes on the device, not initialised. Raises EngineError if they are not there."""
        try:
            pointer = self._call("cuMemAlloc", size)
        except EngineError as error:
            free, total = self.memory()
            raise EngineError(
                f"{error}: {size / 1e9:.2f} GB wanted, {free / 1e9:.2f} of {total / 1e9:.2f} GB free on {self.gpu.name}"
            ) from error
        return DeviceMemory(self, int(pointer), size)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU."""
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate_host(self, size: int) -> HostMemory:
        """`size` bytes of pinned memory of the host, which copies to and from the device need to run beside it."""
        return HostMemory(self, int(self._call("cuMemHostAlloc", size, 0)), size)

    def allocate_mapped(self, size: int) -> MappedMemory:
        """`size` bytes of pinned memory of the host that kernels read over the GPU's link. Raises EngineError."""
        flags = self._driver.CU_MEMHOSTALLOC_DEVICEMAP | self._driver.CU_MEMHOSTALLOC_PORTABLE
        try:
            address = int(self._call("cuMemHostAlloc", size, flags))
        except EngineError as error:
            raise EngineError(f"{error}: {size / 1e9:.2f} GB of the host's memory wanted, pinned") from error
        memory = MappedMemory(self, address, size)
        try:
            memory.device_address = int(self._call("cuMemHostGetDevicePointer", address, 0))
        except EngineError:
            memory.free()
            raise
        return memory

    def copy_in(self, target: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes from pinned memory to the device."""
        self._call("cuMemcpyHtoDAsync", target, source, size, self._stream)

    def copy_out(self, target: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes from the device to pinned memory."""
        self._call("cuMemcpyDtoHAsync", target, source, size, self._stream)

    def copy_within(self, target: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes on the device."""
        self._call("cuMemcpyDtoDAsync", target, source, size, self._stream)

    def copy_rows_in(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Queue a copy from pinned memory to the device: the first `width` bytes of each of `rows`.

        pitch: bytes from a row to the next, on both sides.
        """
        types = self._driver.CUmemorytype
        copy = self._rows(target, pitch, pitch, width, rows)
        copy.srcMemoryType, copy.srcHost = types.CU_MEMORYTYPE_HOST, source
        self._call("cuMemcpy2DAsync", copy, self._stream)

    def copy_rows_within(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Queue a copy on the device of `rows` times `width` bytes. Pitches: from a row to the next, below 2 GiB."""
        types = self._driver.CUmemorytype
        copy = self._rows(target, target_pitch, source_pitch, width, rows)
        copy.srcMemoryType, copy.srcDevice = types.CU_MEMORYTYPE_DEVICE, source
        self._call("cuMemcpy2DAsync", copy, self._stream)

    def _rows(self, target: int, target_pitch: int, source_pitch: int, width: int, rows: int) -> Any:
        copy = self._driver.CUDA_MEMCPY2D()
        copy.dstMemoryType, copy.dstDevice = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE, target
        copy.dstPitch, copy.srcPitch, copy.WidthInBytes, copy.Height = target_pitch, source_pitch, width, rows
        return copy

    def clear(self, address: int, size: int) -> None:
        """Queue `size` zero bytes on the device."""
        self._call("cuMemsetD8Async", address, 0, size, self._stream)

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        self._call("cuStreamSynchronize", self._stream)

    @contextmanager
    def event(self, timed: bool = False) -> Iterator[Event]:
        """A mark in the stream, for as long as the block lasts."""
        flags = self._driver.CUevent_flags
        event = self._call("cuEventCreate", flags.CU_EVENT_DEFAULT if timed else flags.CU_EVENT_DISABLE_TIMING)
        try:
            yield Event(self, event)
        finally:
            self._call("cuEventDestroy", event)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` queues, without running it. Raises EngineError if something in it cannot be recorded."""
        # Thread-local: other threads, which may load something else, are not forbidden to allocate meanwhile.
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # Ends the capture in any case, and fails if the work has spoiled it.
            failed, graph = self._driver.cuStreamEndCapture(self._stream)
            if not failed:
                self._call("cuGraphDestroy", graph)
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        with ExitStack() as undo:
            with ExitStack() as done:
                done.callback(self._call, "cuGraphDestroy", graph)
                recorded = Graph(self, self._call("cuGraphInstantiate", graph, 0))
                undo.callback(recorded.free)
            undo.pop_all()
        return recorded

    def _call(self, name: str, *arguments: Any) -> Any:
        return call(self._driver, name, *arguments)


class DeviceMemory:
    """Bytes on the device at `address`, until `free`."""

    def __init__(self, device: Device, address: int, size: int) -> None:
        self.address, self.size, self._device = address, size, device

    def free(self) -> None:
        address, self.address = self.address, 0  # whatever the driver says: it is not freed twice
        if address:
            self._device._call("cuMemFree", address)


class HostMemory:
    """Pinned bytes of the host at `address`, until `free`; `array` is a view of them, uint8."""

    def __init__(self, device: Device, address: int, size: int) -> None:
        import ctypes

        self.address, self.size, self._device = address, size, device
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free(self) -> None:
        address, self.address, self.array = self.address, 0, np.empty(0, np.uint8)
        if address:
            self._device._call("cuMemFreeHost", address)


class MappedMemory(HostMemory):
    """Pinned bytes of the host that are at `device_address` for kernels, too."""

    device_address = 0


class Event:
    """A mark in a device's stream."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device, self._handle = device, handle

    def record(self) -> None:
        self._device._call("cuEventRecord", self._handle, self._device._stream)

    def wait(self) -> None:
        """Until the stream has passed the last record; at once before the first."""
        self._device._call("cuEventSynchronize", self._handle)

    def seconds_since(self, earlier: Event) -> float:
        """Between two marks that were passed, both timed."""
        return float(self._device._call("cuEventElapsedTime", earlier._handle, self._handle)) / 1e3


class Graph:
    """Recorded work, to be queued again at the same addresses."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device, self._handle = device, handle

    def launch(self) -> None:
        self._device._call("cuGraphLaunch", self._handle, self._device._stream)

    def free(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._device._call("cuGraphExecDestroy", handle)
