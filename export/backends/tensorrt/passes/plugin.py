"""Nodes that TensorRT hands to this package's plugins: each carries the GPU program of its op."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from moevlm.export.graph.builder import Builder
from moevlm.export.passes.base import NodePass, substitute
from moevlm.export.passes.pack_projections import whole
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.runtime.core.dtypes import DTYPES

DOMAIN = "moevlm.tensorrt"  # has no function bodies: TensorRT finds its plugins from any domain
Programs = Callable[[KernelOp], bytes]  # of an op that is compiled, see `plugins.gpu.program`


def plugin_node(op: KernelOp, inputs: Sequence[ir.Value], programs: Programs, name: str | None = None) -> ir.Node:
    """A node of the op. inputs: as many as the op has, in its order."""
    assert len(inputs) == len(op.inputs)
    node = ir.node(op.name, inputs, domain=DOMAIN, num_outputs=len(op.outputs), name=name, version=1)
    # Bytes in the place of text: TensorRT's parser hands a string over as it is, NUL bytes too.
    node.attributes["program"] = ir.Attr("program", ir.AttributeType.STRING, programs(op))
    for value, tensor in zip(node.outputs, op.outputs, strict=True):
        value.type = ir.TensorType(ir.DataType(DTYPES[tensor.dtype].onnx))
    return node


class PluginPass(NodePass):
    """moevlm nodes -> plugin nodes, one for one."""

    domain = DOMAIN

    def __init__(self, programs: Programs) -> None:
        self.programs = programs

    @abstractmethod
    def described(self, graph: ir.Graph, node: ir.Node) -> tuple[KernelOp, list[ir.Value]]:
        """The op that a node is, and its inputs; nodes that the inputs need are put in front of `node`."""

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        op, inputs = self.described(graph, node)
        new = plugin_node(op, inputs, self.programs, node.name)
        for old, made in zip(node.outputs, new.outputs, strict=True):
            made.shape = old.shape
        substitute(graph, node, new)


def side_by_side(graph: ir.Graph, node: ir.Node, parts: Sequence[ir.Value]) -> ir.Value:
    """Rows of the parts, for `node`: what they were split from, or else joined."""
    return whole(*parts) or Builder(graph, node, "rows").op("Concat", *parts, axis=1)


def rounded(values: Sequence[ir.Value | None]) -> Iterator[str]:
    """A line for each of the values that is not float32."""
    for value in values:
        if value is not None and value.dtype not in (None, ir.DataType.FLOAT):
            yield f"{value.name} is {value.dtype}"
