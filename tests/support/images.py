"""Images without a meaning."""

import numpy as np
from PIL import Image


def noise(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Random bytes. size: width and height, in pixels."""
    values = np.random.default_rng([seed, *size]).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(values).convert(mode)
