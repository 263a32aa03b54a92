"""The GPUs that kernels are compiled for, by compute capability.

Limits: CUDA Programming Guide 13, appendix "Compute Capabilities", table of technical specifications per compute
capability. All of these have 64 K 32-bit registers to a block, 255 to a thread and 1024 threads to a block.
"""

from dataclasses import dataclass

REGISTERS_PER_BLOCK = 64 * 1024
REGISTERS_PER_THREAD = 255
THREADS_PER_BLOCK = 1024
TENSOR_MEMORY_COLUMNS = 512  # of SM 10.x and 11.x; allocated by the kernel itself (PTX ISA, tcgen05.alloc)


@dataclass(frozen=True)
class Device:
    """sm: 86 for compute capability 8.6. arch: what ptxas calls it; an "a" means instructions of this one alone, so
    that a cubin runs nowhere else.

    shared: bytes of shared memory that a block may opt in to, static and dynamic together, without what CUDA reserves.
    bf16: has bfloat16 arithmetic. Their names: moevlm.runtime.core.gpus.
    """

    sm: int
    shared: int
    bf16: bool = True

    @property
    def arch(self) -> str:
        return f"sm_{self.sm}a" if self.sm >= 90 else f"sm_{self.sm}"


DEVICES: dict[int, Device] = {
    device.sm: device
    for device in (
        Device(75, 64 * 1024, bf16=False),
        Device(80, 163 * 1024),
        Device(86, 99 * 1024),
        Device(87, 163 * 1024),
        Device(89, 99 * 1024),
        Device(90, 227 * 1024),
        Device(100, 227 * 1024),
        Device(103, 227 * 1024),
        Device(110, 227 * 1024),
        Device(120, 99 * 1024),
        Device(121, 99 * 1024),
    )
}


def device(sm: int) -> Device:
    """The device of a compute capability. Raises ValueError for one that is not compiled for."""
    if sm not in DEVICES:
        raise ValueError(f"sm = {sm} (allowed: {', '.join(map(str, DEVICES))})")
    return DEVICES[sm]
