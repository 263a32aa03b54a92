"""How kernels with quantized weights round their other operand."""

import numpy as np

from moevlm.export.formats.base import TINY


def rounded(x: np.ndarray, group_size: int) -> np.ndarray:
    """Activations [..., K] as kernels round them: to int8, with a scale for every `group_size` of the last axis."""
    width = x.shape[-1]
    padded = np.pad(x.reshape(-1, width), ((0, 0), (0, -width % group_size))).reshape(-1, group_size)
    scale = np.abs(padded).max(1, keepdims=True, initial=0) / 127
    values = np.rint(np.divide(padded, scale, out=np.zeros_like(padded), where=scale > TINY)) * scale
    return values.reshape(-1, width + -width % group_size)[:, :width].reshape(x.shape).astype(x.dtype, copy=False)
