"""The tables of a TileTower: rotary angles, where it has them."""

from collections.abc import Mapping, Sequence

import numpy as np

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.towers import Grid, TileTower
from moevlm.runtime.request.images.blocks import axial_rope, block_order


def pack_tiles(grids: Sequence[Grid], vision: TileTower) -> Mapping[str, np.ndarray]:
    """Inputs of the graph for the patches of images, by name.

    rope_cos, rope_sin: [P, head_dim / 2] float32, first the column's frequencies, then the row's; places count from 1.
    Raises EngineError for an image of another size than the tower's.
    """
    for grid in grids:
        if grid != vision.grid:
            found, wanted = (f"{h} x {w}" for h, w in (grid, vision.grid))
            raise EngineError(f"an image has {found} patches (the model takes {wanted})")
    if not vision.rope_theta:
        return {}
    rows, columns = block_order(grids, vision.merge_size)
    cos, sin = axial_rope(columns + 1, rows + 1, vision)
    return {"rope_cos": cos, "rope_sin": sin}
