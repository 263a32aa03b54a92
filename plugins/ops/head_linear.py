"""The numpy reference of `moevlm::HeadLinear`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def head_linear(x: Array, weight: Array) -> Array:
    """Multiply each head's part of every row by the head's own matrix.

    x: [T, heads * K] float32. weight: [heads, N, K] float32. Returns [T, heads * N] float32.
    """
    heads, out, size = weight.shape
    y = np.einsum("thk,hnk->thn", x.reshape(len(x), heads, size), weight, optimize=True)
    return np.ascontiguousarray(y.reshape(len(x), heads * out))
