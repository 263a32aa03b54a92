"""Attention of queries that all images share to the patches of each."""

import numpy as np
import torch

from bench.gpu.cases.base import Case, Cases, worst
from moevlm.export.formats.base import rounded
from moevlm.plugins.gpu.ops.cross_attention import CrossAttentionOp
from moevlm.plugins.gpu.ops.experts import ACTIVATION_DTYPES
from moevlm.plugins.ops.attention import cross_attention

SHAPES = ((128, 2, 72), (256, 1, 64), (1, 4, 20), (65, 1, 256))  # queries, heads, dimensions of a head


class CrossAttentionCases(Cases):
    """See `Cases`. A call is the patches of each image."""

    kind, step = CrossAttentionOp, 3
    sizes = ((4,), (33, 1, 16, 7), (257, 128), (1000,))

    def every_op(self) -> list[CrossAttentionOp]:
        """Every dtype with many sizes."""
        return [CrossAttentionOp(*shape, dtype) for shape in SHAPES for dtype in ACTIVATION_DTYPES]

    def describe(self, op: CrossAttentionOp) -> str:
        return f"cross attention {op.queries} queries, {op.heads} heads of {op.head_dim} {op.dtype}"

    def case(self, op: CrossAttentionOp, call: tuple[int, ...], seed: int) -> Case:
        random, start = np.random.default_rng(seed), np.cumsum([0, *call]).astype(np.int32)
        width = op.heads * op.head_dim
        q, kv = (
            rounded(random.standard_normal(shape, np.float32), op.dtype)
            for shape in ((op.queries, width), (sum(call), 2 * width))
        )
        parts = (x.astype(np.float64) for x in (q, *np.split(kv, 2, axis=1)))
        y = cross_attention(*parts, start, op.heads)
        arrays = zip((q, kv, start), op.inputs, strict=True)
        given = [torch.from_numpy(array).to(getattr(torch, tensor.dtype)) for array, tensor in arrays]
        return Case(given, lambda found: worst(found, [y]))
