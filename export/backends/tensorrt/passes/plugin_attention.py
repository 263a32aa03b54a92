"""Attention as TensorRT plugins: over pages of keys and values, and of and to the patches of an image."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.backends.tensorrt.passes.plugin import PluginPass, Programs, rounded, side_by_side
from moevlm.export.graph.builder import width
from moevlm.export.graph.cross_attention import CROSS_ATTENTION
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.paged_attention import PAGED_ATTENTION, caches, inputs_of
from moevlm.export.graph.segment_attention import SEGMENT_ATTENTION
from moevlm.export.passes.base import left
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.ops.cross_attention import CrossAttentionOp
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp
from moevlm.runtime.core.states import PAGE_SIZE, SCALE_BYTES


class PluginPagedAttention(PluginPass):
    """moevlm::PagedAttention -> a plugin on rows of q, k and v side by side, which writes into the caches it is given.

    Caches are inputs of the graph and no outputs: [pages, kv_heads, 64, D] in the dtype of activations, or int8 with
    room for a float32 scale of each token and head, D + 4, where they are quantized.
    """

    def __init__(self, dtype: str, cache: str, programs: Programs) -> None:
        """dtype: of activations. cache: "", or "int8" or "fp8" for quantized caches, as in PagedAttentionOp."""
        super().__init__(programs)
        self.dtype, self.cache = dtype, cache

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Gains of norms, sinks and rotary tables are float32."""
        for node in filter(self.matches, model.graph):
            yield from rounded([*node.inputs[3:5], *node.inputs[10:13]])

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::PagedAttention is left, and no cache is an output."""
        yield from left(model, "PagedAttention", self.matches)
        for value in model.graph.outputs:
            if "_cache_out." in str(value.name):
                yield f"{value.name} is an output"

    def matches(self, node: ir.Node) -> bool:
        return is_op(node, PAGED_ATTENTION)

    def described(self, graph: ir.Graph, node: ir.Node) -> tuple[KernelOp, list[ir.Value]]:
        spec, given = node_spec(node), inputs_of(node)
        op = PagedAttentionOp(
            spec,
            width(given.key_cache),
            spec.value_dim if spec.value_in_key else width(given.value_cache),
            self.dtype,
            self.cache,
            PAGE_SIZE,
            has_norms=given.q_norm is not None,
            has_sinks=given.sinks is not None,
            has_visible_end=given.visible_end is not None,
        )
        for cache in (given.key_cache, given.value_cache):
            if cache is None or cache.shape is None:
                continue
            pages, heads, _, _ = cache.shape
            cache.shape = ir.Shape([pages, heads, PAGE_SIZE, width(cache) + (SCALE_BYTES if self.cache else 0)])
            if self.cache:
                cache.type = ir.TensorType(ir.DataType.INT8)
        qkv = side_by_side(graph, node, [value for value in given[:3] if value is not None])
        return op, [qkv, *(value for value in node.inputs[3:] if value is not None)]

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        for _, written in caches(node):
            graph.outputs.remove(written)
        node.resize_outputs(1)
        super().replace(graph, node)


class PluginSegmentAttention(PluginPass):
    """moevlm::SegmentAttention -> a plugin on rows of q, k and v side by side; it needs no mask."""

    def __init__(self, dtype: str, programs: Programs) -> None:
        """dtype: of activations."""
        super().__init__(programs)
        self.dtype = dtype

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Rotary tables are float32."""
        for node in filter(self.matches, model.graph):
            yield from rounded(node.inputs[3:5])

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::SegmentAttention is left."""
        yield from left(model, "SegmentAttention", self.matches)

    def matches(self, node: ir.Node) -> bool:
        return is_op(node, SEGMENT_ATTENTION)

    def described(self, graph: ir.Graph, node: ir.Node) -> tuple[KernelOp, list[ir.Value]]:
        values = [value for value in node.inputs if value is not None]
        heads = node_spec(node).heads
        op = SegmentAttentionOp(heads, width(values[0]) // heads, self.dtype, rotates=len(values) == 6)
        return op, [side_by_side(graph, node, values[:3]), *values[3:]]


class PluginCrossAttention(PluginPass):
    """moevlm::CrossAttention -> a plugin on queries, and on rows of k and v side by side."""

    def __init__(self, dtype: str, programs: Programs) -> None:
        """dtype: of activations."""
        super().__init__(programs)
        self.dtype = dtype

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::CrossAttention is left."""
        yield from left(model, CROSS_ATTENTION, self.matches)

    def matches(self, node: ir.Node) -> bool:
        return is_op(node, CROSS_ATTENTION)

    def described(self, graph: ir.Graph, node: ir.Node) -> tuple[KernelOp, list[ir.Value]]:
        q, k, v, image_start = (value for value in node.inputs if value is not None)
        heads, shape = node_spec(node).heads, q.shape
        assert shape is not None
        queries, wide = shape.numpy()
        op = CrossAttentionOp(queries, heads, wide // heads, self.dtype)
        return op, [q, side_by_side(graph, node, [k, v]), image_start]
