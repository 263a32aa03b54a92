"""Projections and router logits on moevlm's own CPU kernels."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.formats.cpu_packing import CpuForm, PackedFloats, PackedRows
from moevlm.export.formats.stored import cpu_form
from moevlm.export.graph.weights import initializer, weight_of
from moevlm.export.passes.base import NodePass, left, replaced_deciders, substitute
from moevlm.export.passes.pack_projections import has_stored_weight, is_projection
from moevlm.export.passes.projection_pass import ProjectionPass
from moevlm.runtime.backends.libraries import DOMAIN as CPU


def packing_attributes(form: CpuForm) -> dict[str, int]:
    """How a node's weight is packed; zeros and fp4 only where there are some."""
    kinds = {"zeros": form.zeros, "fp4": form.name == "fp4"}
    return {"bits": form.bits, "block_size": form.group_size, **{name: 1 for name, given in kinds.items() if given}}


class CpuLinear(ProjectionPass):
    """Gemm -> moevlm.cpu::Linear, whose weight lies in the file as the kernel reads it.

    Integers and fp4 of a checkpoint stay as they are, whatever the scheme of the others.
    """

    domain = CPU

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        x, weight, *bias = node.inputs
        assert weight is not None
        source = weight_of(weight)
        (rows, width), form = source.shape, cpu_form(self.scheme, source)
        packed = initializer(f"{weight.name}.{form.name}", PackedRows(source, form))
        graph.register_initializer(packed)
        attributes = {"N": rows, "K": width, **packing_attributes(form)}
        new = ir.node("Linear", [x, packed, *bias], attributes=attributes, domain=CPU)
        substitute(graph, node, new)


class CpuFloatLinear(NodePass):
    """Gemm -> moevlm.cpu::FloatLinear, whose weight stays float32: for router logits and gates of states.

    A row's sums have the same order alone and among others; ONNX Runtime's Gemm has another kernel for a single row.
    """

    domain = CPU

    def requires(self, model: ir.Model) -> Iterator[str]:
        """The Gemms to be quantized are no longer there."""
        yield from replaced_deciders(model)
        yield from left(model, "that project", is_projection)

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No Gemm with a stored weight is left."""
        yield from left(model, "Gemm with a stored weight", has_stored_weight)

    def matches(self, node: ir.Node) -> bool:
        return has_stored_weight(node)

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        x, weight, *bias = node.inputs
        assert weight is not None
        rows, width = weight_of(weight).shape
        packed = initializer(f"{weight.name}.panels", PackedFloats(weight_of(weight)))
        graph.register_initializer(packed)
        new = ir.node("FloatLinear", [x, packed, *bias], attributes={"N": rows, "K": width}, domain=CPU)
        substitute(graph, node, new)
