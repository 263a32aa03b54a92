"""The UCI handwritten digits that scikit-learn bundles, split once and for all."""

from __future__ import annotations

from functools import cache

import numpy as np

SPLIT_SEED = 1797
HELD_OUT_SHARE = 0.2


@cache
def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns (ink [N, 8, 8] float32 in 0..1, label [N] int64)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target.astype(np.int64)


@cache
def indices(held_out: bool) -> np.ndarray:
    """Which of the 1797 digits belong to training, or to evaluation."""
    count = len(load()[1])
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    cut = round(count * HELD_OUT_SHARE)
    return np.sort(order[:cut] if held_out else order[cut:])
