"""Vision towers: any number of images of any sizes as one sequence of patches; a file for each kind."""

from moevlm.export.modules.vision import (  # noqa: F401  (they register)
    grid,
    moon,
    pooled,
    query,
    resampled,
    rotary,
    tile,
)
from moevlm.export.modules.vision.base import vision_tower

__all__ = ("vision_tower",)
