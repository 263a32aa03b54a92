"""Pinned memory of the host that kernels read over the GPU's link, as an engine's experts may lie in."""

import ctypes
import math
from typing import Any

import torch

_FLAGS = 1 | 2  # CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP


class MappedMemory:
    """Tensors in such memory, until `close`. driver: the CUDA driver, a shared library."""

    def __init__(self, driver: Any = None) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1") if driver is None else driver
        self._addresses: list[int] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers there. Raises RuntimeError where kernels would find them at another address."""
        size = math.prod(tensor.shape) * tensor.element_size()
        address, seen = ctypes.c_void_p(), ctypes.c_uint64()
        self._check("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_uint(_FLAGS))
        assert address.value is not None
        self._addresses.append(address.value)
        self._check("cuMemHostGetDevicePointer_v2", ctypes.byref(seen), address, ctypes.c_uint(0))
        if seen.value != address.value:  # with unified addressing, which all 64-bit systems have, it is one address
            raise RuntimeError(f"mapped memory is at {seen.value:#x} for kernels, not at {address.value:#x}")
        memory = (ctypes.c_uint8 * size).from_address(address.value)
        made = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
        made.copy_(tensor)
        return made

    def upload(self, source: torch.Tensor, target: torch.Tensor, stream: int) -> None:
        """Queue a copy of such a tensor to the device's own memory. stream: 0 for the default one."""
        size = math.prod(source.shape) * source.element_size()
        places = ctypes.c_uint64(target.data_ptr()), ctypes.c_void_p(source.data_ptr())
        self._check("cuMemcpyHtoDAsync_v2", *places, ctypes.c_size_t(size), ctypes.c_void_p(stream))

    def close(self) -> None:
        while self._addresses:
            self._check("cuMemFreeHost", ctypes.c_void_p(self._addresses.pop()))

    def _check(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, name)(*arguments):
            raise RuntimeError(f"{name}: error {code}")
