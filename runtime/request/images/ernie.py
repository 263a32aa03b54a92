"""The image processor of ERNIE 4.5 VL: that of Qwen2-VL, with larger images, and no copy of a still one."""

from typing import ClassVar

from moevlm.runtime.core.towers import ResampledTower
from moevlm.runtime.request.images.fields import grid_sizes
from moevlm.runtime.request.images.qwen2_vl import Qwen2VLImages


class ErnieImages(Qwen2VLImages):
    """Ernie4_5_VLMoeImageProcessor."""

    TOWER = ResampledTower
    SIZES: ClassVar = grid_sizes(14, frames=1)
    EDGES: ClassVar = (56 * 56, 28 * 28 * 6177)
