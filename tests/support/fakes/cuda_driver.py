"""A strict stand-in for cuda.bindings.driver: device memory on the host, work that waits until someone waits for it.

Stricter than a GPU: queued work runs at the last moment, memory starts as NaN, every address is checked against what
is allocated, it is known of every byte whether it was ever written, and a call outside of a current context fails.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import driver as real

OK = real.CUresult.CUDA_SUCCESS
RELEASES = (
    "Free",
    "Destroy",
    "Release",
    "PopCurrent",
    "EndCapture",
)  # calls that do their work even where they report an error
Work = Callable[[], None]


class AddressSpace:
    """Addresses of the device's memory that nothing of this process has; memory starts as NaN of any kind of float."""

    def __init__(self) -> None:
        self._addresses = itertools.count(0x7F00_0000_0000, 0x1_0000_0000)
        self._written: dict[int, np.ndarray] = {}

    def allocate(self, size: int) -> tuple[int, np.ndarray]:
        """An address, and the memory that stands for the device's there."""
        address = next(self._addresses)
        self._written[address] = np.zeros(size, bool)
        return address, np.full(size, 0xFF, np.uint8)

    def map(self, memory: np.ndarray) -> int:
        """The device's address of pinned memory: another than the host's, so that nobody may mix them up."""
        address = next(self._addresses)
        self._written[address] = np.ones(len(memory), bool)
        return address

    def free(self, address: int) -> None:
        """What is there is no memory of the device any more."""
        del self._written[address]

    def written(self, address: int, size: int) -> np.ndarray:
        """Whether each byte was written since it was allocated, [size] bool, to be read or changed."""
        return _inside(self._written, address, size, "an allocation")

    def wrote(self, address: int, size: int, source: int | None = None) -> None:
        """A copy or a fill has written these bytes. source: where a copy on the device has them from."""
        self.written(address, size)[:] = True if source is None else self.written(source, size)


def _next(queued: list[Work]) -> None:
    """Do the next piece of a stream's work. After one that fails nothing more is done, as on a GPU."""
    try:
        queued.pop(0)()
    except BaseException:
        queued.clear()
        raise


class Faults:
    """Every call of the fakes in order, by name, and the one that shall fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: tuple[str, int] | None = None  # (name, which call of that name, from 0)

    def hit(self, name: str) -> bool:
        """Note a call; whether it shall fail."""
        count = self.calls.count(name) if self.fail is not None and self.fail[0] == name else -1
        self.calls.append(name)
        return self.fail == (name, count)


def call(outputs: int = 0, context: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A driver call that returns (CUresult, *outputs). context: one must be current."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(self: Driver, *arguments: Any) -> tuple[Any, ...]:
            nothing = (None,) * outputs
            name = function.__name__
            fails = self.faults.hit(name)
            assert self.initialised or name == "cuInit", f"{name} before cuInit"
            if context and not self._stack():
                return (real.CUresult.CUDA_ERROR_INVALID_CONTEXT, *nothing)
            if fails and not any(word in name for word in RELEASES):
                return (real.CUresult.CUDA_ERROR_UNKNOWN, *nothing)
            self.spoiled = self.spoiled or fails  # a recording, if there is one
            result = function(self, *arguments)
            if fails:
                return (real.CUresult.CUDA_ERROR_UNKNOWN, *nothing)
            if isinstance(result, real.CUresult) and result != OK:
                return (result, *nothing)
            values = () if outputs == 0 else result if outputs > 1 else (result,)
            return (OK, *values)

        return checked

    return wrap


@dataclass(frozen=True)
class CopiedRows:
    """A copy of rows. pitch: of the source."""

    pitch: int
    width: int
    rows: int
    on_device: bool


class Driver:
    """The module. devices: how many there are. sm: compute capability of the first. total: bytes of its memory.

    space: where its memory lies.
    """

    CUresult = real.CUresult
    CUdevice_attribute = real.CUdevice_attribute
    CUstream_flags = real.CUstream_flags
    CUevent_flags = real.CUevent_flags
    CUstreamCaptureMode = real.CUstreamCaptureMode
    CUmemorytype = real.CUmemorytype
    CUDA_MEMCPY2D = real.CUDA_MEMCPY2D
    CU_MEMHOSTALLOC_DEVICEMAP = real.CU_MEMHOSTALLOC_DEVICEMAP
    CU_MEMHOSTALLOC_PORTABLE = real.CU_MEMHOSTALLOC_PORTABLE

    def __init__(
        self, sm: tuple[int, int] = (8, 9), devices: int = 1, total: int = 1 << 30, space: AddressSpace | None = None
    ) -> None:
        self.faults = Faults()
        self.sm, self.devices, self.total = sm, devices, total
        self.initialised = False
        self.retained = 0
        self.device: dict[int, np.ndarray] = {}
        self.host: dict[int, np.ndarray] = {}
        self.host_total = 1 << 30  # bytes that may be pinned
        self.mapped: dict[int, int] = {}  # address on the device of pinned memory that kernels may read, by the host's
        self.streams: dict[int, list[Work]] = {}
        self.events: dict[int, bool] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self.capturing: list[Work] | None = None
        self.spoiled = False
        self.copied_in = self.copied_out = 0  # bytes
        self.copied_rows: list[CopiedRows] = []
        self.bandwidth = 500e9  # bytes per second of copies on the device, on whose clock nothing else takes time
        self.seconds = 0.0
        self.times: dict[int, float] = {}  # of timed events, when they were last passed
        self.replays = 0
        self._contexts = threading.local()
        self._handles = itertools.count(1)
        self.space = space or AddressSpace()

    def leaks(self) -> dict[str, int]:
        """What was not given back, by kind; empty if nothing."""
        kinds = ("device", "host", "streams", "events", "graphs", "executables")
        found = {kind: len(getattr(self, kind)) for kind in kinds}
        found |= {"retained": self.retained, "current": len(self._stack())}
        return {kind: count for kind, count in found.items() if count}

    def view(self, address: int, size: int) -> np.ndarray:
        """Bytes that kernels may read; refuses what is not inside one allocation."""
        mapped = {address: self.host[base] for base, address in self.mapped.items()}
        return _inside(self.device | mapped, address, size, "an allocation")

    def _write(self, address: int, data: np.ndarray | int, size: int) -> None:
        self.view(address, size)[:] = data
        self.space.wrote(address, size)

    def queue(self, stream: int, work: Work) -> None:
        """Work of a library on a stream, or of a call here."""
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self.streams[int(stream)].append(work)

    def _stack(self) -> list[int]:
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        return self._contexts.stack

    def _pinned(self, address: int, size: int) -> np.ndarray:
        return _inside(self.host, address, size, "pinned memory")

    def _copy(self, target: int, source: int, size: int) -> None:
        """On the device; what was not written before is not written then."""
        self.view(target, size)[:] = self.view(source, size)
        self.space.wrote(target, size, source)
        self.seconds += 2 * size / self.bandwidth

    def _forbidden_in_capture(self) -> bool:
        if self.capturing is not None:
            self.spoiled = True
            return True
        return False

    def _drain(self) -> None:
        for work in self.streams.values():
            while work:
                _next(work)

    @call(context=False)
    def cuInit(self, Flags: int) -> Any:
        assert Flags == 0
        self.initialised = True
        return OK if self.devices else real.CUresult.CUDA_ERROR_NO_DEVICE

    @call(1, context=False)
    def cuDriverGetVersion(self) -> Any:
        return 13000

    @call(1, context=False)
    def cuDeviceGet(self, ordinal: int) -> Any:
        return real.CUdevice(ordinal) if ordinal < self.devices else real.CUresult.CUDA_ERROR_INVALID_DEVICE

    @call(1, context=False)
    def cuDeviceGetAttribute(self, attrib: Any, dev: Any) -> Any:
        assert int(dev) < self.devices
        attributes = self.CUdevice_attribute
        return {
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.sm[0],
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.sm[1],
        }[attrib]

    @call(1, context=False)
    def cuDeviceGetName(self, length: int, dev: Any) -> Any:
        assert int(dev) < self.devices
        return b"Fake GPU".ljust(length, b"\0")

    @call(1, context=False)
    def cuDevicePrimaryCtxRetain(self, dev: Any) -> Any:
        assert int(dev) < self.devices
        self.retained += 1
        return real.CUcontext(0xC0)

    @call(context=False)
    def cuDevicePrimaryCtxRelease(self, dev: Any) -> Any:
        assert int(dev) < self.devices
        assert self.retained
        self.retained -= 1

    @call(context=False)
    def cuCtxPushCurrent(self, ctx: Any) -> Any:
        assert int(ctx) == 0xC0
        assert self.retained
        self._stack().append(0xC0)

    @call(1)
    def cuCtxPopCurrent(self) -> Any:
        return real.CUcontext(self._stack().pop())

    @call(1)
    def cuStreamCreate(self, Flags: int) -> Any:
        assert Flags == self.CUstream_flags.CU_STREAM_NON_BLOCKING
        handle = next(self._handles)
        self.streams[handle] = []
        return real.CUstream(handle)

    @call()
    def cuStreamDestroy(self, hStream: Any) -> Any:
        self._drain()
        del self.streams[int(hStream)]

    @call()
    def cuStreamSynchronize(self, hStream: Any) -> Any:
        if self._forbidden_in_capture():
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        work = self.streams[int(hStream)]
        while work:
            _next(work)
        return OK

    @call(1)
    def cuMemAlloc(self, bytesize: int) -> Any:
        if self._forbidden_in_capture():
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        if not bytesize:
            return real.CUresult.CUDA_ERROR_INVALID_VALUE
        if sum(map(len, self.device.values())) + bytesize > self.total:
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        address, memory = self.space.allocate(bytesize)
        self.device[address] = memory
        return real.CUdeviceptr(address)

    @call()
    def cuMemFree(self, dptr: Any) -> Any:
        self._drain()  # as the driver does
        del self.device[int(dptr)]
        self.space.free(int(dptr))

    @call(1)
    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> Any:
        mapped = self.CU_MEMHOSTALLOC_DEVICEMAP | self.CU_MEMHOSTALLOC_PORTABLE
        assert Flags in (0, mapped)
        if self._forbidden_in_capture() or not bytesize:
            return real.CUresult.CUDA_ERROR_INVALID_VALUE
        memory = np.full(bytesize, 0xFF, np.uint8)
        if sum(map(len, self.host.values())) + bytesize > self.host_total:
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        self.host[memory.ctypes.data] = memory
        if Flags == mapped:
            self.mapped[memory.ctypes.data] = self.space.map(memory)
        return memory.ctypes.data

    @call(1)
    def cuMemHostGetDevicePointer(self, p: int, Flags: int) -> Any:
        assert Flags == 0
        return real.CUdeviceptr(self.mapped[p])

    @call()
    def cuMemFreeHost(self, p: Any) -> Any:
        self._drain()
        memory = self.host.pop(p)
        if p in self.mapped:
            self.space.free(self.mapped.pop(p))
        ctypes.memset(p, 0xFF, len(memory))  # whoever still looks sees NaN

    @call(2)
    def cuMemGetInfo(self) -> Any:
        return self.total - sum(map(len, self.device.values())), self.total

    @call()
    def cuMemcpyHtoDAsync(self, dstDevice: Any, srcHost: int, ByteCount: int, hStream: Any) -> Any:
        def work() -> None:
            self._write(int(dstDevice), self._pinned(srcHost, ByteCount), ByteCount)
            self.copied_in += ByteCount

        self.queue(hStream, work)

    @call()
    def cuMemcpyDtoHAsync(self, dstHost: int, srcDevice: Any, ByteCount: int, hStream: Any) -> Any:
        def work() -> None:
            self._pinned(dstHost, ByteCount)[:] = self.view(int(srcDevice), ByteCount)
            self.copied_out += ByteCount

        self.queue(hStream, work)

    @call()
    def cuMemcpyDtoDAsync(self, dstDevice: Any, srcDevice: Any, ByteCount: int, hStream: Any) -> Any:
        self.queue(hStream, lambda: self._copy(int(dstDevice), int(srcDevice), ByteCount))

    @call()
    def cuMemcpy2DAsync(self, pCopy: Any, hStream: Any) -> Any:
        host = pCopy.srcMemoryType == real.CUmemorytype.CU_MEMORYTYPE_HOST
        assert host or pCopy.srcMemoryType == real.CUmemorytype.CU_MEMORYTYPE_DEVICE
        assert pCopy.dstMemoryType == real.CUmemorytype.CU_MEMORYTYPE_DEVICE
        assert not pCopy.srcXInBytes | pCopy.srcY | pCopy.dstXInBytes | pCopy.dstY
        source, target = int(pCopy.srcHost) if host else int(pCopy.srcDevice), int(pCopy.dstDevice)
        pitches, width, rows = (pCopy.srcPitch, pCopy.dstPitch), pCopy.WidthInBytes, pCopy.Height
        if not 0 < width <= min(pitches) or not rows or max(pitches) >= 1 << 31:
            return real.CUresult.CUDA_ERROR_INVALID_VALUE

        def work() -> None:
            self.copied_rows.append(CopiedRows(pitches[0], width, rows, not host))
            for row in range(rows):
                at, to = source + row * pitches[0], target + row * pitches[1]
                if host:
                    self._write(to, self._pinned(at, width), width)
                else:
                    self._copy(to, at, width)

        self.queue(hStream, work)
        return OK

    @call()
    def cuMemsetD8Async(self, dstDevice: Any, uc: int, N: int, hStream: Any) -> Any:
        def work() -> None:
            self._write(int(dstDevice), uc, N)

        self.queue(hStream, work)

    @call(1)
    def cuEventCreate(self, Flags: int) -> Any:
        assert Flags in (self.CUevent_flags.CU_EVENT_DISABLE_TIMING, self.CUevent_flags.CU_EVENT_DEFAULT)
        handle = next(self._handles)
        self.events[handle] = True
        if Flags == self.CUevent_flags.CU_EVENT_DEFAULT:
            self.times[handle] = float("nan")
        return real.CUevent(handle)

    @call()
    def cuEventDestroy(self, hEvent: Any) -> Any:
        del self.events[int(hEvent)]

    @call()
    def cuEventRecord(self, hEvent: Any, hStream: Any) -> Any:
        self.events[int(hEvent)] = False

        def work() -> None:
            if int(hEvent) in self.events:
                self.events[int(hEvent)] = True
                if int(hEvent) in self.times:
                    self.times[int(hEvent)] = self.seconds

        self.queue(hStream, work)

    @call()
    def cuEventSynchronize(self, hEvent: Any) -> Any:
        for work in self.streams.values():
            while work and not self.events[int(hEvent)]:
                _next(work)

    @call(1)
    def cuEventElapsedTime(self, hStart: Any, hEnd: Any) -> Any:
        if not (self.events[int(hStart)] and self.events[int(hEnd)]):
            return real.CUresult.CUDA_ERROR_NOT_READY
        return 1e3 * (self.times[int(hEnd)] - self.times[int(hStart)])

    @call()
    def cuStreamBeginCapture(self, hStream: Any, mode: Any) -> Any:
        assert mode == self.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        assert int(hStream) in self.streams
        assert self.capturing is None
        self.capturing, self.spoiled = [], False

    @call(1)
    def cuStreamEndCapture(self, hStream: Any) -> Any:
        assert int(hStream) in self.streams
        work, self.capturing = self.capturing, None
        assert work is not None
        if self.spoiled:
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        handle = next(self._handles)
        self.graphs[handle] = work
        return real.CUgraph(handle)

    @call(1)
    def cuGraphInstantiate(self, hGraph: Any, flags: int) -> Any:
        assert flags == 0
        handle = next(self._handles)
        self.executables[handle] = list(self.graphs[int(hGraph)])
        return real.CUgraphExec(handle)

    @call()
    def cuGraphLaunch(self, hGraphExec: Any, hStream: Any) -> Any:
        work = self.executables[int(hGraphExec)]
        self.replays += 1
        for piece in work:
            self.queue(hStream, piece)

    @call()
    def cuGraphDestroy(self, hGraph: Any) -> Any:
        del self.graphs[int(hGraph)]

    @call()
    def cuGraphExecDestroy(self, hGraphExec: Any) -> Any:
        del self.executables[int(hGraphExec)]

    def cuGetErrorString(self, error: Any) -> Any:
        return OK, {real.CUresult.CUDA_ERROR_OUT_OF_MEMORY: b"out of memory"}.get(error, b"unknown error")


def _inside(memories: dict[int, np.ndarray], address: int, size: int, what: str) -> np.ndarray:
    for base, memory in memories.items():
        if base <= address and address + size <= base + len(memory):
            return memory[address - base : address - base + size]
    raise AssertionError(f"{size} bytes at {address:#x} are not inside {what}")
