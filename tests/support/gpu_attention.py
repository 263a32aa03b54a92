"""Results of PagedAttention's kernels, interpreted, held to the spec."""

from collections.abc import Mapping, Sequence

import numpy as np

from bench.paged_attention import deviation
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp

# Relative Frobenius norm. Interpreted bfloat16 is cut off, not rounded.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}


def check(op: PagedAttentionOp, inputs: Mapping[str, np.ndarray], results: Sequence[np.ndarray]) -> None:
    """y and the caches, see `deviation`."""
    assert deviation(op, inputs, results) <= TOLERANCES[op.dtype]
