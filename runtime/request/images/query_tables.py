"""The table of a QueryTower: which row of its learned positions a patch has."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from moevlm.runtime.core.towers import Grid, QueryTower
from moevlm.runtime.request.images.blocks import block_order

_LAST = np.float32(1.0 - 1e-6)  # place in an image, in parts of its side


def pack_buckets(grids: Sequence[Grid], vision: QueryTower) -> Mapping[str, np.ndarray]:
    """Inputs of the graph for the patches of images, by name.

    grids: (h, w) in patches. position_index: [P, 1] int64, the row of the table [position_grid**2] on which a patch
    falls if its image is laid over the whole table: `Idefics3VisionEmbeddings` of transformers, in float32 as there.
    """
    side = vision.position_grid
    image = np.repeat(np.arange(len(grids)), [h * w for h, w in grids])
    rows, columns = (
        _buckets(place, np.array([grid[axis] for grid in grids], np.int64)[image], side)
        for axis, place in enumerate(block_order(grids, vision.merge_size))
    )
    return {"position_index": (rows * side + columns)[:, None]}


def _buckets(place: np.ndarray, patches: np.ndarray, side: int) -> np.ndarray:
    """Rows of an axis of the table. place: [P] int64 on that axis. patches: [P] int64, all of the image on it."""
    part = np.minimum(place.astype(np.float32) * (np.float32(1) / patches.astype(np.float32)), _LAST)
    return np.searchsorted(_borders(side), part, side="right").astype(np.int64)


def _borders(side: int) -> np.ndarray:
    """The numbers of torch.arange(1 / side, 1, 1 / side) on a CPU, float32: patches often lie on them, so bits count.

    It makes 16 at a time: either half begins with a number that is rounded, to which multiples of the step are added in
    double precision. Those that fill no 16 are rounded once.
    """
    step = 1 / side
    at = np.arange(math.ceil((1.0 - step) / step))
    start = np.where(at < len(at) - len(at) % 16, at - at % 8, at)
    rounded = (step + start * step).astype(np.float32)
    return (rounded.astype(np.float64) + (at - start) * step).astype(np.float32)
