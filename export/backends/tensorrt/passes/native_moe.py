"""Experts as TensorRT's own MoE layer, which some GPUs have."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.formats.stored import narrowed
from moevlm.export.graph.builder import Builder
from moevlm.export.graph.moe_functions import EXPERTS, ROUTER
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.rearranged import Picked, swap_last
from moevlm.export.graph.weights import initializer, weight_of
from moevlm.export.passes.base import Pass, left
from moevlm.plugins.ops.spec import ExpertsSpec
from moevlm.runtime.core.errors import BuildError

SILU = 1  # as nvinfer1::MoEActType counts; the parser takes a name for 0, no activation at all


class NativeMoE(Pass):
    """moevlm::MoEExperts -> TRT_MoE on [1, T, H], whose weights [E, H, I], [E, H, I], [E, I, H] are part of the plan.

    Raises BuildError for experts that it does not compute.
    """

    def requires(self, model: ir.Model) -> Iterator[str]:
        """The dtype of what experts read is known: their weights get it."""
        yield from left(model, "MoEExperts of no dtype", lambda node: is_op(node, EXPERTS) and _dtype(node) is None)

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::MoEExperts is left; routing is another pass's."""
        yield from left(model, "MoEExperts", lambda node: is_op(node, EXPERTS))

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if is_op(node, EXPERTS)]
        for node in found:
            _replace(model.graph, node)
        return len(found)


def _dtype(node: ir.Node) -> ir.DataType | None:
    return None if node.inputs[0] is None else node.inputs[0].dtype


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    spec = node_spec(node)
    if spec != ExpertsSpec(alpha=spec.alpha, limit=spec.limit):
        raise BuildError(
            f"TensorRT's own MoE cannot compute {node.name}: activation = {spec.activation}, gated = {spec.gated}, "
            f"weight_on = {spec.weight_on} (allowed: silu, gated, weight on the output)"
        )
    x, index, weight, gate_up, down, *biases = node.inputs
    assert x is not None and x.dtype is not None and gate_up is not None and down is not None
    if index is not None and (chosen := index.producer()) is not None and not is_op(chosen, ROUTER):
        raise BuildError(
            f"TensorRT's own MoE cannot compute {node.name}: some tokens go to no expert of {gate_up.name}"
        )
    rows, inner = weight_of(gate_up), weight_of(down).shape[2]
    parts = {
        "gate": swap_last(Picked(rows, range(inner))),
        "up": swap_last(Picked(rows, range(inner, 2 * inner))),
        "down": swap_last(weight_of(down)),
    }
    if biases:
        assert biases[0] is not None and biases[1] is not None
        bias = weight_of(biases[0])
        parts |= {"gate_bias": Picked(bias, range(inner)), "up_bias": Picked(bias, range(inner, 2 * inner))}
        parts["down_bias"] = weight_of(biases[1])
    b, stored = Builder(graph, node, "moe"), []
    for name, part in parts.items():
        stored.append(initializer(f"{gate_up.name}.native.{name}", narrowed(part, x.dtype.numpy())))
        graph.register_initializer(stored[-1])
    scores = b.op("Cast", weight, to=int(x.dtype))
    batched = [b.op("Unsqueeze", value, b.integers(0)) for value in (x, index, scores)]
    batched_y = b.op("TRT_MoE", *batched, *stored, activation_type=SILU)
    b.replace(node, [b.op("Squeeze", batched_y, b.integers(0))])
