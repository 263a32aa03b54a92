"""How a bundle is loaded: the keyword arguments of `moevlm.runtime.load`, checked."""

from __future__ import annotations

from dataclasses import dataclass

from moevlm.runtime.backends.base import EngineOptions
from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import RefusedOption, require_positive
from moevlm.runtime.core.experts_in import DEVICE, require_experts_in
from moevlm.runtime.perf.process_limits import cores


@dataclass(frozen=True)
class LoadOptions:
    """Fields as in `moevlm.runtime.load`. Raises RequestError for a value that is not allowed."""

    threads: int | None = None
    spinning: bool = True
    chunk_tokens: int | None = None
    max_image_pixels: int = defaults.MAX_IMAGE_PIXELS
    max_image_tokens: int | None = None
    cache_memory: int | None = None
    experts_in: str = DEVICE

    def __post_init__(self) -> None:
        require_cores(self.threads)
        for name in ("chunk_tokens", "max_image_pixels", "max_image_tokens", "cache_memory"):
            value = getattr(self, name)
            if value is not None or name == "max_image_pixels":
                require_positive(name, value)
        if not isinstance(self.spinning, bool):
            raise RefusedOption("spinning", self.spinning, "true or false")
        require_experts_in(self.experts_in)

    @property
    def engine(self) -> EngineOptions:
        """Those of the engine alone."""
        return EngineOptions(self.threads, self.spinning, self.experts_in)


def require_cores(threads: int | None) -> None:
    """Raises RequestError for more threads than this process has cores."""
    most = cores()
    good = isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= most
    if threads is not None and not good:
        raise RefusedOption("threads", threads, f"1 to {most}, this process's cores")
