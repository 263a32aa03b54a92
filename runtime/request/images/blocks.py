"""Where the patches of images stand, in the order in which all towers take them."""

from collections.abc import Sequence

import numpy as np

from moevlm.runtime.core.rotary import inverse_frequencies
from moevlm.runtime.core.towers import Grid, Tower


def block_order(grids: Sequence[Grid], merge: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of each patch, [P] int64: the merge x merge blocks row by row, the patches of a block likewise."""
    places: list[np.ndarray] = [np.zeros((2, 0), np.int64)]
    for h, w in grids:
        blocks = np.indices((h, w)).reshape(2, h // merge, merge, w // merge, merge)
        places.append(blocks.transpose(0, 1, 3, 2, 4).reshape(2, h * w))
    rows, columns = np.concatenate(places, axis=1)
    return rows, columns


def axial_rope(first: np.ndarray, second: np.ndarray, vision: Tower) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of patches at places (first, second), [P] each; both axes have the same frequencies.

    Returns two [P, head_dim / 2] float32, the frequencies of the first axis before those of the second.
    """
    frequencies = inverse_frequencies(vision.head_dim // 2, vision.rope_theta)
    return rope_of_axes((first, frequencies), (second, frequencies))


def rope_of_axes(*axes: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of patches, [P, frequencies of all axes] float32 each, axis after axis.

    axes: places [P] int64 and inverse frequencies [N] float32 of each.
    """
    found = [_angles(*axis) for axis in axes]
    return np.concatenate([cos for cos, _ in found], axis=1), np.concatenate([sin for _, sin in found], axis=1)


def _angles(places: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(places.max(initial=-1) + 1, dtype=np.float32)[:, None] * frequencies
    exact = angle.astype(np.float64)  # The angle is float32 as in PyTorch; its cosine may as well be rounded correctly.
    return np.cos(exact).astype(np.float32)[places], np.sin(exact).astype(np.float32)[places]
