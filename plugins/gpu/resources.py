"""What a compiled kernel takes of a GPU, read from its cubin, and whether the GPU has that much."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moevlm.plugins.gpu import devices

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_RESERVED = 1024  # shared memory that CUDA keeps of every block; from SM 9.0 on, cubins count it as theirs


@dataclass(frozen=True)
class Resources:
    """registers: of a thread. spilled: bytes of a thread's registers that lie in its stack, in device memory, instead.

    shared: bytes of shared memory of a block, static and dynamic. columns: of tensor memory. image: bytes of the cubin.
    """

    entry: str
    sm: int
    warps: int
    registers: int
    spilled: int
    shared: int
    columns: int
    image: int

    def check(self) -> None:
        """Raise ValueError, naming the first limit of the device that the kernel is over."""
        device = devices.device(self.sm)
        threads = 32 * self.warps
        # Registers are handed to a warp by the 256, so a thread takes a multiple of 8.
        block = -(-self.registers // 8) * 8 * threads
        for what, value, limit in (
            ("bytes of shared memory", self.shared, device.shared),
            ("threads", threads, devices.THREADS_PER_BLOCK),
            ("registers of a thread", self.registers, devices.REGISTERS_PER_THREAD),
            ("registers of a block", block, devices.REGISTERS_PER_BLOCK),
            ("columns of tensor memory", self.columns, devices.TENSOR_MEMORY_COLUMNS),
        ):
            if value > limit:
                raise ValueError(f"{self.entry} does not fit {device.arch}: {value} {what} (allowed: up to {limit})")


def measure(
    image: bytes, entry: str, sm: int, warps: int, dynamic: int, columns: int, cuobjdump: str | Path
) -> Resources:
    """The resources of the one kernel of a cubin. dynamic: its shared memory that is given at launch, in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    usage = _USAGE.search(text)
    if usage is None:
        raise ValueError(f"{entry}: cuobjdump says nothing of its resources: {' '.join(text.split())}")
    registers, stack, static, local = map(int, usage.groups())
    if sm >= 90:
        static = max(0, static - _RESERVED)
    return Resources(entry, sm, warps, registers, stack + local, static + dynamic, columns, len(image))
