"""Areas that an image or all frames of a video may have, and the size of whole blocks nearest to its own within them.

Numerically `smart_resize` of Qwen2-VL and GLM-4V in Hugging Face transformers 5.24, which rounds in double precision,
halves to even.
"""

import math
from collections.abc import Mapping
from typing import Any

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.request.images.fields import IMAGE_FILE, refuse

_MAX_ASPECT = 200
# In pixels. Every image is enlarged to the first; the second is as large as a float counts exactly.
_MAX_EDGES = {"shortest_edge": 1 << 26, "longest_edge": 1 << 53}


def read_edges(fields: Mapping[str, Any], default: tuple[int, int], file: str = IMAGE_FILE) -> tuple[int, int]:
    """Smallest and largest area, by either spelling; min_pixels and max_pixels win over size.

    file: what errors name. Raises BundleError.
    """
    size = fields.get("size", dict(zip(_MAX_EDGES, default, strict=True)))
    if not isinstance(size, Mapping):
        refuse("size", size, "an object with shortest_edge and longest_edge", file)
    edges = []
    for (edge, most), pixels in zip(_MAX_EDGES.items(), ("min_pixels", "max_pixels"), strict=True):
        value = fields.get(pixels, size.get(edge))
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            refuse(pixels if pixels in fields else f"size.{edge}", value, f"a whole number from 1 to {most}", file)
        edges.append(value)
    return edges[0], edges[1]


def enlarged(height: int, width: int, block: int) -> tuple[int, int]:
    """The size as it is, unless a side is shorter than a block: then that becomes one block, the aspect ratio kept."""
    if min(height, width) >= block:
        return height, width
    scale = max(block / height, block / width)
    return int(height * scale), int(width * scale)


def require_aspect(height: int, width: int, what: str) -> None:
    """Raises RequestError for too elongated a size. what: is so large, in words."""
    if max(height, width) / min(height, width) > _MAX_ASPECT:
        raise RequestError(f"{what}: one side is more than {_MAX_ASPECT} times the other")


def blocks_within(
    height: int,
    width: int,
    block: int,
    edges: tuple[int, int],
    frames: int = 1,
    counted: int | None = None,
    most: int | None = None,
) -> tuple[int, int]:
    """Rows and columns of blocks nearest to (height, width), with an area within the edges.

    block: its side, in pixels. frames: how often a pixel counts in an area; counted: in that of whole blocks, where it
    differs. most: blocks that are not exceeded by enlarging if sides rounded down avoid it.
    """
    shortest, longest = edges
    rows, columns = round(height / block), round(width / block)
    area = (frames if counted is None else counted) * rows * columns * block**2
    if area > longest:
        shrink = math.sqrt(frames * height * width / longest)
        rows, columns = (max(1, math.floor(side / shrink / block)) for side in (height, width))
    elif area < shortest:
        grow = math.sqrt(shortest / (frames * height * width))
        rows, columns = (math.ceil(side * grow / block) for side in (height, width))
        if most is not None and rows * columns > most:
            rows, columns = (max(1, math.floor(side * grow / block)) for side in (height, width))
    return rows, columns
