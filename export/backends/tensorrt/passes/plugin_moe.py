"""Router and experts as TensorRT plugins, the experts' weights as inputs of the graph."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.backends.tensorrt.expert_weights import expert_tensors, storing
from moevlm.export.backends.tensorrt.passes.plugin import PluginPass, Programs
from moevlm.export.backends.tensorrt.passes.typed import other_experts
from moevlm.export.graph.moe_functions import EXPERTS, ROUTER
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.weights import Weight, weight_of
from moevlm.export.passes.base import left
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.runtime.core.dtypes import DTYPES

_WEIGHT = "moevlm.weight"


class PluginMoE(PluginPass):
    """moevlm::MoERouter and moevlm::MoEExperts -> plugins.

    Every weight and bias of the experts becomes an input of the graph, stored as the kernels read it: `expert_weights`.
    """

    def __init__(self, dtype: str, weights: str, group_size: int, programs: Programs) -> None:
        """dtype: of the activations. weights, group_size: as `storing` takes them."""
        super().__init__(programs)
        self.dtype, self.weights, self.group_size = dtype, weights, group_size

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Typed has run with this dtype; expert weights are initializers."""
        yield from other_experts(model, ir.DataType(DTYPES[self.dtype].onnx))
        for node in (node for node in model.graph if is_op(node, EXPERTS)):
            if not all(value.is_initializer() for value in node.inputs[3:] if value is not None):
                yield f"the weights of {node.outputs[0].name} are not all stored"

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::MoERouter and no moevlm::MoEExperts is left."""
        yield from left(model, "of moevlm's MoE", self.matches)

    def matches(self, node: ir.Node) -> bool:
        return is_op(node, ROUTER) or is_op(node, EXPERTS)

    def described(self, graph: ir.Graph, node: ir.Node) -> tuple[KernelOp, list[ir.Value]]:
        values = [value for value in node.inputs if value is not None]
        if is_op(node, ROUTER):
            return router_op(node), values
        op = self._experts_op(node)
        return op, [*values[:3], *_weight_inputs(graph, node, op)]

    def _experts_op(self, node: ir.Node) -> ExpertsOp:
        gate_up, down = (weight_of(_value(node, i)) for i in (3, 4))
        experts, hidden, inner = down.shape
        op = ExpertsOp(
            node_spec(node),
            experts,
            _size(_value(node, 1), 1),
            hidden,
            inner,
            self.dtype,
            has_biases=len(node.inputs) == 7,
        )
        return storing(op, self.weights, self.group_size, gate_up, down)


def router_op(node: ir.Node) -> RouterOp:
    """What a moevlm::MoERouter node computes."""
    has_bias, has_scale = (any(node.inputs[i : i + 1]) for i in (1, 2))
    return RouterOp(node_spec(node), _size(_value(node, 0), 1), has_bias, has_scale)


def expert_weights(model: ir.Model) -> dict[str, Weight]:
    """The inputs that `PluginMoE` added, by name, in the order in which they are written."""
    return {str(value.name): value.meta[_WEIGHT] for value in model.graph.inputs if _WEIGHT in value.meta}


def _weight_inputs(graph: ir.Graph, node: ir.Node, op: ExpertsOp) -> list[ir.Value]:
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    values = dict(zip(names, node.inputs[3:], strict=False))
    prefix = str(_value(node, 3).name).rpartition(".")[0] or str(node.name)
    stored = expert_tensors(op, {name: weight_of(value) for name, value in values.items() if value is not None})
    made = {}
    for name, weight in stored.items():
        made[name] = ir.Value(
            name=f"{prefix}.{name}",
            shape=ir.Shape(weight.shape),
            type=ir.TensorType(ir.DataType.from_numpy(weight.dtype)),
        )
        made[name].meta[_WEIGHT] = weight
        graph.inputs.append(made[name])
    return [made[tensor.name] for tensor in op.inputs[3:]]


def _value(node: ir.Node, i: int) -> ir.Value:
    value = node.inputs[i]
    assert value is not None
    return value


def _size(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    assert isinstance(size, int)
    return size
