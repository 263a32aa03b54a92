"""The residual sum and the norm behind it in one kernel."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.passes.base import CONTRIB, Pass, left


class FuseSkipNorm(Pass):
    """Add + RMSNormalization -> com.microsoft::SkipSimplifiedLayerNormalization, which also yields the sum."""

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Sums that are normed are of two tensors of one shape."""
        for norm in model.graph:
            add = _normed_sum(norm)
            if add is not None and len({str(value.shape) for value in add.inputs if value is not None}) > 1:
                yield f"{norm.outputs[0].name} is the norm of a sum of two shapes"

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No RMSNormalization reads a sum."""
        yield from left(model, "that norm a sum", lambda node: _normed_sum(node) is not None)

    def apply(self, model: ir.Model) -> int:
        fused = 0
        for norm in list(model.graph):
            if (add := _normed_sum(norm)) is not None:
                _fuse(model.graph, add, norm)
                fused += 1
        if fused:
            model.graph.opset_imports[CONTRIB] = 1
        return fused


def _normed_sum(node: ir.Node) -> ir.Node | None:
    """The Add whose sum an RMSNormalization reads; None of other nodes."""
    if node.op_type != "RMSNormalization" or node.domain or node.inputs[0] is None:
        return None
    add = node.inputs[0].producer()
    return add if add is not None and add.op_type == "Add" and not add.domain else None


def _fuse(graph: ir.Graph, add: ir.Node, norm: ir.Node) -> None:
    node = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        attributes={"epsilon": norm.attributes["epsilon"].as_float()},
        domain=CONTRIB,
        num_outputs=4,  # the norm, two for training, the sum
    )
    old, new = (norm.outputs[0], add.outputs[0]), (node.outputs[0], node.outputs[3])
    ir.convenience.replace_nodes_and_values(graph, add, [norm, add], [node], old, new)
