"""kernels.json beside the plans of a TensorRT engine: the most that its kernels take of a GPU."""

from __future__ import annotations

from pathlib import PurePosixPath

import msgspec

from moevlm.runtime.backends.base import KernelsReport
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import BundleError

KERNELS = "kernels.json"


class Kernel(msgspec.Struct, frozen=True):
    """registers: of a thread. spilled: bytes of a thread's registers in device memory. shared: bytes of a block."""

    sm: int
    kernel: str
    registers: int
    spilled: int
    shared: int


class _Op(msgspec.Struct, frozen=True):
    kernels: list[Kernel]


def kernels_of(bundle: Bundle, engine: EngineMetadata) -> KernelsReport | None:
    """None where the bundle does not say. Raises BundleError if the file is damaged."""
    name = str(PurePosixPath(engine.decoder).with_name(KERNELS))
    if name not in bundle.manifest.files:
        return None
    try:
        ops = msgspec.json.decode(bundle.read_bytes(name), type=list[_Op])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{bundle.directory / name}: {error}") from None
    kernels = [kernel for op in ops for kernel in op.kernels]
    registers, shared, spilled = (
        max((getattr(kernel, name) for kernel in kernels), default=0) for name in ("registers", "shared", "spilled")
    )
    return KernelsReport(len(kernels), registers, shared, spilled)
