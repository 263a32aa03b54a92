"""How much of a GPU's memory pages may take: what is free once an engine is loaded and has run."""

from __future__ import annotations

from moevlm.runtime.backends.tensorrt.cuda import Device
from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.states import StateSpec, page_bytes

# For features of images that are kept, and for what the driver takes later: recordings, kernels that are loaded when
# they first run.
RESERVED = defaults.FEATURE_MEMORY + (512 << 20)


def cache_memory(
    device: Device, states: tuple[StateSpec, ...], page_size: int, max_pages: int, image_bytes: int
) -> int:
    """Bytes for pages. max_pages: as many as the engine takes, page 0 included. image_bytes: for a call for images.

    Called inside the device's context. Raises EngineError where not one page fits beside page 0.
    """
    free, total = device.memory()
    page, reserved = page_bytes(states, page_size), RESERVED + image_bytes
    if free - reserved < 2 * page:
        raise EngineError(
            f"too little memory on {device.gpu.name}: {free / 1e9:.2f} of {total / 1e9:.2f} GB are free behind the "
            f"engine, {(reserved + 2 * page) / 1e9:.2f} GB are needed for images and two pages of keys and values"
        )
    return min(free - reserved, max_pages * page)
