"""Attention among the patches of images."""

import numpy as np
import torch

from bench.gpu.cases.base import Case, Cases, worst
from moevlm.export.formats.base import rounded
from moevlm.plugins.gpu.ops.experts import ACTIVATION_DTYPES
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp
from moevlm.plugins.ops.attention import segment_attention

HEADS = {72: 2, 64: 4, 128: 1, 20: 3, 80: 2, 256: 1}  # by their size


class SegmentAttentionCases(Cases):
    """See `Cases`. A call is the patches of each image."""

    kind, step = SegmentAttentionOp, 4
    sizes = ((4,), (33, 1, 0, 16, 7), (257, 128), (1000,))

    def every_op(self) -> list[SegmentAttentionOp]:
        """Every dtype with heads of many sizes, and with heads that are not rotated."""
        still = [SegmentAttentionOp(2, 64, dtype, rotates=False) for dtype in ACTIVATION_DTYPES]
        turned = [SegmentAttentionOp(heads, dim, dtype) for dim, heads in HEADS.items() for dtype in ACTIVATION_DTYPES]
        return turned + still

    def describe(self, op: SegmentAttentionOp) -> str:
        still = "" if op.rotates else ", not rotated"
        return f"segment attention {op.heads} heads of {op.head_dim} {op.dtype}{still}"

    def case(self, op: SegmentAttentionOp, call: tuple[int, ...], seed: int) -> Case:
        random, start = np.random.default_rng(seed), np.cumsum([0, *call]).astype(np.int32)
        angle = random.uniform(0, 6, (sum(call), op.head_dim // 2))
        qkv = random.standard_normal((sum(call), 3 * op.heads * op.head_dim), np.float32)
        tables = {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
        inputs = {"qkv": rounded(qkv, op.dtype), **(tables if op.rotates else {}), "image_start": start}
        parts = np.split(inputs["qkv"].astype(np.float64), 3, axis=1)
        y = segment_attention(*parts, inputs.get("cos"), inputs.get("sin"), start, op.heads)
        given = [torch.from_numpy(inputs[tensor.name]).to(getattr(torch, tensor.dtype)) for tensor in op.inputs]
        return Case(given, lambda found: worst(found, [y]))
