"""Vision towers: any number of images of any sizes as one sequence of patches; a file for each kind."""

from moevlm.export.modules.vision import grid, moon, pooled, rotary, tile  # noqa: F401  (each registers its tower)
from moevlm.export.modules.vision.base import vision_tower

__all__ = ("vision_tower",)
