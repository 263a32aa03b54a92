"""The tables of a RotaryTower and of a ResampledTower: rotary angles on two axes."""

from collections.abc import Mapping, Sequence

import numpy as np

from moevlm.runtime.core.rotary import inverse_frequencies
from moevlm.runtime.core.towers import Grid, ResampledTower, RotaryTower
from moevlm.runtime.request.images.blocks import axial_rope, block_order, rope_of_axes


def pack_rotary(grids: Sequence[Grid], vision: RotaryTower) -> Mapping[str, np.ndarray]:
    """Inputs of the graph for the patches of images, by name.

    grids: (h, w) in patches, whole blocks. rope_cos, rope_sin: [P, head_dim / 2] float32, first the row's frequencies,
    then the column's.
    """
    rows, columns = block_order(grids, vision.merge_size)
    frequencies = inverse_frequencies(vision.head_dim, vision.rope_theta)
    cos, sin = rope_of_axes((rows, frequencies[0::2]), (columns, frequencies[1::2]))
    return {"rope_cos": cos, "rope_sin": sin}


def pack_axial(grids: Sequence[Grid], vision: ResampledTower) -> Mapping[str, np.ndarray]:
    """The same where both axes have the same frequencies."""
    cos, sin = axial_rope(*block_order(grids, vision.merge_size), vision)
    return {"rope_cos": cos, "rope_sin": sin}
