"""The residual sum and the norm behind it in one kernel."""

import onnx_ir as ir

from moevlm.export.passes.base import CONTRIB, Pass


class FuseSkipNorm(Pass):
    """Add + RMSNormalization -> com.microsoft::SkipSimplifiedLayerNormalization, which also yields the sum.

    Requires: sums that are normed are of two tensors of one shape. Ensures: no RMSNormalization reads a sum.
    """

    def apply(self, model: ir.Model) -> int:
        fused = 0
        for norm in [n for n in model.graph if n.op_type == "RMSNormalization" and not n.domain]:
            x = norm.inputs[0]
            add = None if x is None else x.producer()
            if x is not None and add is not None and add.op_type == "Add" and not add.domain:
                _fuse(model.graph, add, norm)
                fused += 1
        if fused:
            model.graph.opset_imports[CONTRIB] = 1
        return fused


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
