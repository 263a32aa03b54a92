"""The tables of a PooledTower: a row of each axis' learned table, rotary angles."""

from collections.abc import Mapping, Sequence

import numpy as np

from moevlm.runtime.core.towers import Grid, PooledTower
from moevlm.runtime.request.images.blocks import axial_rope, block_order


def pack_axes(grids: Sequence[Grid], vision: PooledTower) -> Mapping[str, np.ndarray]:
    """Inputs of the graph for the patches of images, by name.

    grids: (h, w) in patches, whole blocks, no side longer than the table. position_index: [P, 2] int64, a patch's
    column in the first table, and its row in the second, which lies behind. rope_cos, rope_sin: [P, head_dim / 2]
    float32, first the column's frequencies, then the row's.
    """
    rows, columns = block_order(grids, vision.merge_size)
    cos, sin = axial_rope(columns, rows, vision)
    index = np.stack([columns, vision.position_table + rows], axis=1)
    return {"position_index": index, "rope_cos": cos, "rope_sin": sin}
