"""How much of a GPU's memory pages may take: what is free once an engine is loaded and has run."""

from __future__ import annotations

from moevlm.runtime.backends.tensorrt.cuda import Device
from moevlm.runtime.core import defaults
from moevlm.runtime.core.engine_metadata import TensorRTMetadata
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.states import StateSpec, page_bytes, row_bytes

# What the driver takes later: recordings, kernels that are loaded when they first run.
_LATER = 512 << 20


def reserved(images: bool) -> int:
    """Bytes that are left free for that, and for features of images that are kept, where the engine takes images."""
    return _LATER + (defaults.FEATURE_MEMORY if images else 0)


def cache_memory(
    device: Device, states: tuple[StateSpec, ...], page_size: int, metadata: TensorRTMetadata, image_bytes: int | None
) -> int:
    """Bytes for pages and rows of states, as many as the engine takes at most.

    image_bytes: for a call for images; None for an engine that takes none.

    Called inside the device's context. Raises EngineError where not one page and row fit beside page 0 and row 0.
    """
    free, total = device.memory()
    page, row = page_bytes(states, page_size), row_bytes(states)
    kept_free = reserved(image_bytes is not None) + (image_bytes or 0)
    if free - kept_free < 2 * (page + row):
        kept = "two pages of keys and values" + (", two rows of states" if row else "")
        images = "" if image_bytes is None else "images and "
        raise EngineError(
            f"too little memory on {device.gpu.name}: {free / 1e9:.2f} of {total / 1e9:.2f} GB are free behind the "
            f"engine, {(kept_free + 2 * (page + row)) / 1e9:.2f} GB are needed for {images}{kept}"
        )
    return min(free - kept_free, metadata.max_pages * page + metadata.max_rows * row)
