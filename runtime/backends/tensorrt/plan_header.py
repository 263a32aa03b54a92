"""What a serialized TensorRT engine, a plan, says of itself in its first bytes: readable on any machine."""

import struct
from dataclasses import dataclass

HEADER_BYTES = 64
_PRODUCTS = {b"vtrt": "tensorrt_rtx", b"ftrt": "tensorrt", b"ptrt": "tensorrt"}
_RTX = "tensorrt_rtx"
# In TensorRT-RTX plans, a bit each: observed in plans built for one kind of GPU at a time.
_SM_BITS = {1: 75, 2: 80, 4: 86, 8: 89, 16: 120, 32: 121}


@dataclass(frozen=True)
class PlanHeader:
    """product: "tensorrt" or "tensorrt_rtx". version: of it, as major.minor.patch.build. length: of the plan in bytes.

    sms: the kinds of GPUs it was built for, 86 for compute capability 8.6; empty where the header does not say.
    """

    product: str
    version: str
    length: int
    sms: tuple[int, ...]


def plan_header(data: bytes) -> PlanHeader | None:
    """The header in the first HEADER_BYTES of a plan; None if this is not one."""
    product = _PRODUCTS.get(data[:4])
    if product is None or len(data) < HEADER_BYTES:
        return None
    (length,) = struct.unpack_from("<Q", data, 16)
    (mask,) = struct.unpack_from("<I", data, 32)
    sms = tuple(sm for bit, sm in _SM_BITS.items() if mask & bit) if product == _RTX else ()
    return PlanHeader(product, ".".join(map(str, data[24:28])), length, sms)
