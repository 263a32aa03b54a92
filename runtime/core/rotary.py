"""Frequencies of rotary embeddings."""

import numpy as np


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """theta ** -(2i / dim) for i < dim / 2 (RoFormer, section 3.2.2), [ceil(dim / 2)] float32."""
    return np.float32(1) / rotary_powers(dim, theta)


def rotary_powers(dim: int, theta: float) -> np.ndarray:
    """theta ** (2i / dim) for i < dim / 2, [ceil(dim / 2)] float32: the reciprocals of inverse frequencies.

    Exponent, power and reciprocal are each rounded to float32, like PyTorch's: an angle is position * frequency, so
    one more digit here would move far positions away from what the model was trained with. The power itself is
    correctly rounded, which PyTorch's is for all but a few frequencies (there it is one unit in the last place off).
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
