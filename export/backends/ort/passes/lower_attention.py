"""Attention of one sequence in one page on ONNX Runtime's grouped-query kernel."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from moevlm.export.graph.builder import Builder, width
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.paged_attention import INPUTS, PAGED_ATTENTION, inputs_of
from moevlm.export.passes.base import CONTRIB, Pass
from moevlm.plugins.ops.spec import AttentionSpec

_INT32 = int(ir.DataType.INT32)
_HEAD_SINK = 11  # which of the kernel's inputs


class LowerAttention(Pass):
    """moevlm::PagedAttention -> RotaryEmbedding + com.microsoft::GroupQueryAttention, writing into the cache it reads.

    A step has one sequence, whose caches are the one page [1, kv_heads, capacity, D] of the pool.
    A PagedAttention that the kernel cannot express keeps its body, and reads that page.
    Rotation stays outside the kernel: its own looks the table up by position, and ours has a row for each token.
    """

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """Where a PagedAttention is left, keys and values differ in size, share a cache, or rotate other dimensions, or
        tokens see later ones or their chunk alone.
        """
        for node in (node for node in model.graph if is_op(node, PAGED_ATTENTION)):
            table = inputs_of(node).page_table
            if _expressible(node):
                yield f"{node.outputs[0].name} is not lowered"
            elif table is None or not table.is_initializer():
                yield f"{node.outputs[0].name} reads pages of a table"

    def apply(self, model: ir.Model) -> int:
        nodes = [node for node in model.graph if is_op(node, PAGED_ATTENTION)]
        found = [node for node in nodes if _expressible(node)]
        if not nodes:
            return 0
        b = Builder(model.graph, nodes[0], "attention")
        if found:
            rewriter = _Rewriter(b, found)
            model.graph.opset_imports[CONTRIB] = 1
        for node in nodes:
            if node in found:
                rewriter.replace(node)
            else:  # its body finds the page where the kernel does
                node.replace_input_with(INPUTS.index("page_table"), b.array("first_page", np.zeros((1, 1), np.int32)))
        return len(nodes)


def _expressible(node: ir.Node) -> bool:
    spec: AttentionSpec = node_spec(node)
    inputs = inputs_of(node)
    if spec.value_in_key or spec.rotary_start or spec.chunk or inputs.visible_end is not None:
        return False
    return width(inputs.key_cache) == width(inputs.value_cache)


class _Rewriter:
    """What all layers share is computed once, in front of the first: the kernel's lengths and the rotary tables."""

    def __init__(self, b: Builder, nodes: list[ir.Node]) -> None:
        """b: in front of the first of `nodes`."""
        self._b, inputs = b, [inputs_of(node) for node in nodes]
        tokens = b.op("Cast", b.op("Shape", inputs[0].q, start=0, end=1), to=_INT32)
        total = b.op("Add", inputs[0].context_len, tokens)
        self._last = b.op("Sub", total, b.array("one", np.array([1], np.int32)))
        self._total = b.op("Squeeze", total)
        tables = dict.fromkeys(table for given in inputs for table in (given.cos, given.sin) if table)
        self._tables = {table: b.op("Unsqueeze", table, b.integers(0)) for table in tables}

    def replace(self, node: ir.Node) -> None:
        b, spec = self._b, node_spec(node)
        b.before = node
        q, k, v, cos, sin, key_cache, value_cache, _, _, _, q_norm, k_norm, sinks, _ = inputs_of(node)
        v = self._value(k if v is None else v, width(value_cache), spec)
        q = self._turned(q, spec.heads, width(key_cache), spec, q_norm, (cos, sin))
        k = self._turned(k, spec.kv_heads, width(key_cache), spec, k_norm, (cos, sin))
        inputs = [q, k, v, key_cache, value_cache, self._last, self._total]
        if sinks is not None:
            inputs += [*[None] * (_HEAD_SINK - len(inputs)), sinks]
        attributes: dict[str, Any] = {"num_heads": spec.heads, "kv_num_heads": spec.kv_heads}
        attributes |= {"scale": spec.scale} if spec.scale else {}
        attributes |= {"softcap": spec.softcap} if spec.softcap else {}
        attributes |= {"local_window_size": spec.window} if spec.window else {}
        y, *caches = b.ops("GroupQueryAttention", *inputs, outputs=3, domain=CONTRIB, **attributes)
        b.replace(node, [b.op("Squeeze", y, b.integers(0)), *caches])

    def _value(self, v: ir.Value | None, dim: int, spec: AttentionSpec) -> ir.Value:
        """v [T, kv_heads * dim], normed as far as the node does: [1, T, kv_heads * dim]."""
        b = self._b
        if spec.value_norm:
            gain = b.array(f"ones.{dim}", np.ones(dim, np.float32))
            v = self._normed(v, spec.kv_heads, dim, gain, spec.epsilon)
        return b.op("Reshape", v, b.integers(1, -1, spec.kv_heads * dim))

    def _normed(self, x: ir.Value | None, heads: int, dim: int, gain: ir.Value, epsilon: float) -> ir.Value:
        """x [T, heads * dim] -> [T, heads, dim]."""
        b = self._b
        split = b.op("Reshape", x, b.integers(-1, heads, dim))
        return b.op("RMSNormalization", split, gain, axis=-1, epsilon=epsilon)

    def _turned(
        self,
        x: ir.Value | None,
        heads: int,
        dim: int,
        spec: AttentionSpec,
        norm: ir.Value | None,
        tables: tuple[ir.Value | None, ...],
    ) -> ir.Value:
        """x [T, heads * dim], normed and rotated as far as the node does: [1, T, heads * dim]."""
        b = self._b
        if norm is not None:
            x = self._normed(x, heads, dim, norm, spec.epsilon)
        x = b.op("Reshape", x, b.integers(1, -1, heads * dim))
        if not spec.rotary_dim:
            return x
        turned = [self._tables[table] for table in tables if table]
        return b.op("RotaryEmbedding", x, *turned, num_heads=heads, rotary_embedding_dim=spec.rotary_dim)
