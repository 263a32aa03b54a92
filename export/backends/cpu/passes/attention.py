"""Attention over pages on moevlm's own CPU kernel."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.backends.states import cache_dtype
from moevlm.export.graph.builder import Builder
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.paged_attention import PAGED_ATTENTION, caches
from moevlm.export.passes.base import NodePass, left
from moevlm.export.passes.pack_projections import whole
from moevlm.plugins.ops.spec import attributes
from moevlm.runtime.backends.libraries import DOMAIN as CPU
from moevlm.runtime.core.states import SCALE_BYTES


class CpuAttention(NodePass):
    """moevlm::PagedAttention -> moevlm.cpu::PagedAttention on rows of q, k and v side by side.

    Where q, k and v come from one Split, its input is used as it is. A cache's input and output may be bound to one
    buffer; how a page lies in it is the kernel's own. kv_cache: of each, see `cache_dtype`; in int8 a row of D values
    is followed by its own float32 scale.
    """

    domain = CPU

    def __init__(self, kv_cache: str = "float32") -> None:
        self.kv_cache = kv_cache

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::PagedAttention is left."""
        yield from left(model, "moevlm::PagedAttention", self.matches)

    def matches(self, node: ir.Node) -> bool:
        return is_op(node, PAGED_ATTENTION)

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        rows, others = [value for value in node.inputs[:3] if value is not None], node.inputs[3:]
        spec = node_spec(node)
        if cache_dtype(self.kv_cache, spec.value_in_key) == "int8":
            for cache in (value for pair in caches(node) for value in pair):
                _make_int8(cache)
        b, told = Builder(graph, node, "attention"), attributes(spec)
        qkv = whole(*rows) or b.op("Concat", *rows, axis=1)
        b.replace(node, b.ops(PAGED_ATTENTION, qkv, *others, outputs=len(node.outputs), domain=CPU, **told))


def _make_int8(cache: ir.Value) -> None:
    assert cache.shape is not None
    *outer, width = cache.shape
    assert isinstance(width, int)
    cache.shape = ir.Shape([*outer, width + SCALE_BYTES])
    cache.type = ir.TensorType(ir.DataType.INT8)
