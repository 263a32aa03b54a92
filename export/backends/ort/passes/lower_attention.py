"""Attention of one sequence in one page on ONNX Runtime's grouped-query kernel."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.paged_attention import PAGED_ATTENTION
from moevlm.export.graph.weights import Constant, initializer
from moevlm.export.passes.base import CONTRIB, Pass
from moevlm.plugins.ops.spec import AttentionSpec

_INT32 = int(ir.DataType.INT32)
_PAGE_TABLE, _HEAD_SINK = 9, 11  # which of the op's inputs, and of the kernel's


class LowerAttention(Pass):
    """moevlm::PagedAttention -> RotaryEmbedding + com.microsoft::GroupQueryAttention, writing into the cache it reads.

    A step has one sequence, whose caches are the one page [1, kv_heads, capacity, D] of the pool.
    A PagedAttention that the kernel cannot express keeps its body, and reads that page.
    Rotation stays outside the kernel: its own looks the table up by position, and ours has a row for each token.
    """

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """Where a PagedAttention is left, keys and values differ in size, share a cache, or rotate other dimensions."""
        for node in (node for node in model.graph if is_op(node, PAGED_ATTENTION)):
            table = node.inputs[_PAGE_TABLE]
            if _expressible(node):
                yield f"{node.outputs[0].name} is not lowered"
            elif table is None or not table.is_initializer():
                yield f"{node.outputs[0].name} reads pages of a table"

    def apply(self, model: ir.Model) -> int:
        nodes = [node for node in model.graph if is_op(node, PAGED_ATTENTION)]
        found = [node for node in nodes if _expressible(node)]
        if found:
            rewriter = _Rewriter(model.graph, found)
            model.graph.opset_imports[CONTRIB] = 1
        for node in nodes:
            if node in found:
                rewriter.replace(node)
            else:  # its body finds the page where the kernel does
                node.replace_input_with(_PAGE_TABLE, _array(model.graph, "first_page", np.zeros((1, 1), np.int32)))
        return len(nodes)


def _expressible(node: ir.Node) -> bool:
    spec: AttentionSpec = node_spec(node)
    return not spec.value_in_key and not spec.rotary_start and _width(node.inputs[5]) == _width(node.inputs[6])


def _width(cache: ir.Value | None) -> int:
    assert cache is not None and cache.shape is not None
    width = cache.shape[3]
    assert isinstance(width, int)
    return width


def _array(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    name = f"attention.{name}"
    if name not in graph.initializers:
        graph.register_initializer(initializer(name, Constant(array)))
    return graph.initializers[name]


class _Rewriter:
    """What all layers share is computed once, in front of the first: the kernel's lengths and the rotary tables."""

    def __init__(self, graph: ir.Graph, nodes: list[ir.Node]) -> None:
        self.graph, first = graph, nodes[0]
        context = first.inputs[8]
        tokens = self._op(first, "Cast", self._op(first, "Shape", first.inputs[0], start=0, end=1), to=_INT32)
        total = self._op(first, "Add", context, tokens)
        self.last = self._op(first, "Sub", total, _array(self.graph, "one", np.array([1], np.int32)))
        self.total = self._op(first, "Squeeze", total)
        tables = dict.fromkeys(table for node in nodes for table in node.inputs[3:5])
        self.tables = {table: self._op(first, "Unsqueeze", table, self._integers(0)) for table in tables}

    def replace(self, node: ir.Node) -> None:
        q, k, v, cos, sin, key_cache, value_cache, _, _, _, q_norm, k_norm, sinks = self._inputs(node)
        spec: AttentionSpec = node_spec(node)
        dim = _width(key_cache)
        tables = [self.tables[table] for table in (cos, sin)]
        q, k = (
            self._turned(node, x, count, dim, spec, norm, tables)
            for x, count, norm in ((q, spec.heads, q_norm), (k, spec.kv_heads, k_norm))
        )
        v = self._op(node, "Unsqueeze", v, self._integers(0))
        inputs = [q, k, v, key_cache, value_cache, self.last, self.total]
        if sinks is not None:
            inputs += [*[None] * (_HEAD_SINK - len(inputs)), sinks]
        attributes: dict[str, Any] = {"num_heads": spec.heads, "kv_num_heads": spec.kv_heads}
        attributes |= {"scale": spec.scale} if spec.scale else {}
        attributes |= {"softcap": spec.softcap} if spec.softcap else {}
        attributes |= {"local_window_size": spec.window} if spec.window else {}
        attention = ir.node("GroupQueryAttention", inputs, attributes=attributes, domain=CONTRIB, num_outputs=3)
        self.graph.insert_before(node, attention)
        y = self._op(node, "Squeeze", attention.outputs[0], self._integers(0))
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [], node.outputs, [y, *attention.outputs[1:]])

    @staticmethod
    def _inputs(node: ir.Node) -> list[ir.Value | None]:
        return [*node.inputs, *[None] * (13 - len(node.inputs))]

    def _turned(
        self,
        node: ir.Node,
        x: ir.Value | None,
        heads: int,
        dim: int,
        spec: AttentionSpec,
        norm: ir.Value | None,
        tables: list[ir.Value],
    ) -> ir.Value:
        """x [T, heads * dim], normed and rotated: [1, T, heads * dim]."""
        if norm is not None:
            split = self._op(node, "Reshape", x, self._integers(-1, heads, dim))
            x = self._op(node, "RMSNormalization", split, norm, axis=-1, epsilon=spec.epsilon)
        x = self._op(node, "Reshape", x, self._integers(1, -1, heads * dim))
        return self._op(node, "RotaryEmbedding", x, *tables, num_heads=heads, rotary_embedding_dim=spec.rotary_dim)

    def _integers(self, *values: int) -> ir.Value:
        return _array(self.graph, "_".join(map(str, values)), np.array(values, np.int64))

    def _op(self, before: ir.Node, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        self.graph.insert_before(before, node)
        return node.outputs[0]
