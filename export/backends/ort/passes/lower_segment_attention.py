"""Attention inside images on ONNX Runtime's tiled kernel."""

from collections.abc import Iterator
from functools import partial

import onnx_ir as ir

from moevlm.export.graph.cross_attention import CROSS_ATTENTION
from moevlm.export.graph.op import is_op
from moevlm.export.graph.segment_attention import SEGMENT_ATTENTION
from moevlm.export.passes.base import Pass, left

_TILED = {SEGMENT_ATTENTION: "SegmentFlashAttention", CROSS_ATTENTION: "CrossFlashAttention"}


class LowerSegmentAttention(Pass):
    """moevlm::SegmentAttention, CrossAttention -> moevlm::SegmentFlashAttention, CrossFlashAttention.

    Their bodies run com.microsoft::MultiHeadAttention, whose memory grows linearly with the patches (3136 patches, 8
    heads: 0.6 of the masked form's time).
    """

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No SegmentAttention and no CrossAttention is left."""
        for name in _TILED:
            yield from left(model, name, partial(is_op, op_type=name))

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if any(is_op(node, name) for name in _TILED)]
        for node in found:
            node.op_type = _TILED[node.op_type]
        return len(found)
