"""moevlm::MoERouter + moevlm::MoEExperts -> com.microsoft::MoE on ONNX Runtime's CPU."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from moevlm.export.graph.builder import Builder
from moevlm.export.graph.moe_functions import EXPERTS, ROUTER
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.rearranged import Picked
from moevlm.export.graph.weights import initializer, weight_of
from moevlm.export.passes.base import CONTRIB, Pass, left
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.errors import BuildError

# Softmax takes this to exactly 0 beside any log(weight), and it is finite, so that no NaN can arise.
NOT_CHOSEN = -1e30
# A weight of 0 has no logarithm; this one, the smallest normal float32, is 0 beside any other.
SMALLEST = 1.17549435e-38
HALF_ULP = 2.0**-25


class LowerMoE(Pass):
    """Run the experts in ONNX Runtime's own sparse kernel, which reads the weights of chosen experts only.

    That kernel takes router logits, does softmax and top-k itself, and knows no other routing. Two forms:
    - direct, the router's logits straight in: softmax over all or over the chosen experts, no correction bias, no
      groups, an epsilon too small to show in float32; a scale is multiplied on afterwards. Equal logits are the one
      difference: there the kernel takes the higher index, and the moevlm ops the lower.
    - routed, everything else: the router's body stays, and the kernel gets log(weight) at the chosen experts and
      NOT_CHOSEN elsewhere, whose softmax is weight / sum(weight); the sum is multiplied on afterwards where it is not
      1. This also holds where the router's outputs have another user, so that a tap shows the routing that was used.
    With the weight on the input, each token becomes k scaled rows that see one expert each, and these are added up.

    The kernel's swiglu (interleaved rows only) is gated silu with alpha 1, beta 0 and no limit, and swiglu_clamped with
    beta 1. Its silu is ungated silu, and its gelu is the tanh form (measured on [-6, 6]: within 4.3e-7 of tanh, 4.7e-4
    away from erf). Gated gelu_tanh has no form there: those nodes keep their bodies, a loop over the chosen experts
    that takes 1.4 times the kernel's time for 1 token, 1.1 times for 256 (H 1024, I 384, 8 of 64 experts, 1 thread).
    So do those whose router has factors for its experts: a factor may be negative, and no weight of a softmax is. And
    those to which some tokens do not go, as those of the other kind (ERNIE 4.5 VL): that kernel has k experts for each.
    """

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Expert weights and biases are initializers."""
        for node in (node for node in model.graph if is_op(node, EXPERTS)):
            if not all(value.is_initializer() for value in node.inputs[3:] if value is not None):
                yield f"the weights of {node.outputs[0].name} are not all stored"

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """The only moevlm::MoEExperts left are gated gelu_tanh, or not weighted as a router alone says."""
        yield from left(model, "MoEExperts", is_lowerable)

    def apply(self, model: ir.Model) -> int:
        interleaved: dict[ir.Value, ir.Value] = {}
        lowered = 0
        for node in [n for n in model.graph if is_op(n, EXPERTS)]:
            attributes = kernel_attributes(node_spec(node))
            if attributes is not None and is_lowerable(node):
                _lower(model.graph, node, attributes, interleaved)
                lowered += 1
        if lowered:
            model.graph.opset_imports[CONTRIB] = 1
        return lowered


def is_lowerable(node: ir.Node) -> bool:
    """A moevlm::MoEExperts that the kernel can compute."""
    return is_op(node, EXPERTS) and kernel_attributes(node_spec(node)) is not None and _is_routed(node)


def _is_routed(node: ir.Node) -> bool:
    """Whether index and weight are what one router chose, without factors for experts."""
    index, weight = node.inputs[1:3]
    router = None if index is None else index.producer()
    same = router is not None and weight is not None and weight.producer() is router
    return same and router is not None and is_op(router, ROUTER) and not any(router.inputs[2:])


def kernel_attributes(spec: ExpertsSpec) -> dict[str, int | float | str] | None:
    """What tells com.microsoft::MoE on a CPU to compute these experts; None where it cannot."""
    if spec.activation == "swiglu_clamped":
        swiglu = {"activation_alpha": spec.alpha, "activation_beta": 1.0, "swiglu_limit": spec.limit}
        return {"activation_type": "swiglu", "swiglu_fusion": 1, **swiglu}
    if not spec.gated:
        return {"activation_type": {"silu": "silu", "gelu_tanh": "gelu"}[spec.activation]}
    if spec.activation == "silu":
        return {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    return None


def is_direct(spec: RouterSpec, experts: int, has_bias: bool) -> bool:
    """Whether the kernel's own softmax and top-k over the router's logits are this router (its scale left out)."""
    grouped = spec.topk_group < spec.n_group
    if spec.scoring == "sigmoid" or has_bias or grouped:
        return False
    # The k best of E softmax scores add up to at least k / E.
    smallest_sum = 1.0 if spec.scoring == "softmax_after_topk" else spec.top_k / experts
    return not spec.renormalize or spec.epsilon < HALF_ULP * smallest_sum


def _lower(
    graph: ir.Graph, node: ir.Node, attributes: Mapping[str, Any], interleaved: dict[ir.Value, ir.Value]
) -> None:
    """Put a com.microsoft::MoE node, and what its routing needs around it, in the place of a MoEExperts node."""
    b = Builder(graph, node, "moe")
    x, index, weight, gate_up, down = (_input(node, i) for i in range(5))
    gate_up_bias, down_bias = [*node.inputs[5:], None, None][:2]
    router = index.producer()
    assert router is not None
    spec, routing = node_spec(node), node_spec(router)
    experts = weight_of(gate_up).shape[0]
    if spec.gated:
        gate_up = _interleaved(graph, gate_up, interleaved)
        gate_up_bias = gate_up_bias and _interleaved(graph, gate_up_bias, interleaved)

    def kernel(rows: ir.Value, probs: ir.Value, k: int, normalize: bool) -> ir.Value:
        """rows [R, H] f32, probs [R, E] f32 -> [R, H] f32."""
        inputs = [rows, probs, gate_up, gate_up_bias, down, down_bias]
        routed = {"k": k, "normalize_routing_weights": int(normalize)}
        return b.op("MoE", *inputs, domain=CONTRIB, **attributes, **routed)

    if spec.weight_on == "input":
        y = _one_row_per_choice(b, x, index, weight, experts, kernel)
    elif is_direct(routing, experts, has_bias=any(router.inputs[1:])) and _only_user(router, node):
        renormalize = routing.renormalize or routing.scoring == "softmax_after_topk"
        y = kernel(x, _input(router, 0), routing.top_k, renormalize)
        if routing.scale != 1:
            y = b.op("Mul", y, _number(b, routing.scale))
    else:
        y = kernel(x, _log_probs(b, index, weight, experts), routing.top_k, normalize=True)
        if not _sums_to_one(routing):
            y = b.op("Mul", y, b.op("ReduceSum", weight, b.integers(1), keepdims=1))
    b.replace(node, [y])


def _input(node: ir.Node, i: int) -> ir.Value:
    value = node.inputs[i] if i < len(node.inputs) else None
    if value is None:
        raise BuildError(f"node {node.name}: input {i} of {node.op_type} is missing")
    return value


def _only_user(router: ir.Node, node: ir.Node) -> bool:
    return all(set(v.consumers()) <= {node} and not v.is_graph_output() for v in router.outputs)


def _sums_to_one(spec: RouterSpec) -> bool:
    shares = (spec.renormalize and spec.epsilon == 0) or (spec.scoring == "softmax_after_topk" and not spec.renormalize)
    return shares and spec.scale == 1


def _log_probs(b: Builder, index: ir.Value, weight: ir.Value | None, experts: int) -> ir.Value:
    """[R, k] index and weight (None: k = 1, weight 1) -> [R, E] f32, whose softmax is weight / sum(weight) at index."""
    shape = b.op("Concat", b.op("Shape", index, start=0, end=1), b.integers(experts), axis=0)
    nothing = b.op("Expand", _number(b, NOT_CHOSEN), shape)
    if weight is None:
        logs = b.op("Expand", _number(b, 0), b.op("Shape", index))
    else:
        logs = b.op("Log", b.op("Max", weight, _number(b, SMALLEST)))
    return b.op("ScatterElements", nothing, index, logs, axis=1)


def _one_row_per_choice(
    b: Builder, x: ir.Value, index: ir.Value, weight: ir.Value, experts: int, kernel: Callable[..., ir.Value]
) -> ir.Value:
    """x [T, H] times weight [T, k] as T * k rows, each through the one expert in index, added up per token: [T, H]."""
    weighted = b.op("Mul", b.op("Unsqueeze", x, b.integers(1)), b.op("Unsqueeze", weight, b.integers(2)))
    hidden = b.op("Shape", x, start=1, end=2)
    rows = b.op("Reshape", weighted, b.op("Concat", b.integers(-1), hidden, axis=0))
    choices = b.op("Reshape", index, b.integers(-1, 1))
    out = kernel(rows, _log_probs(b, choices, None, experts), k=1, normalize=True)
    per_choice = b.op("Reshape", out, b.op("Shape", weighted), allowzero=1)
    return b.op("ReduceSum", per_choice, b.integers(1), keepdims=0)


def _number(b: Builder, value: float) -> ir.Value:
    """float32, a scalar."""
    name = f"float.{value:.9g}".replace("+", "")  # a plus joins the names of weights that were packed
    return b.array(name, np.array(value, np.float32))


def _interleaved(graph: ir.Graph, value: ir.Value, known: dict[ir.Value, ir.Value]) -> ir.Value:
    """The initializer [E, 2I, ...] with rows g0, u0, g1, u1 in the place of all gate rows, then all up rows."""
    if value not in known:
        source = weight_of(value)
        turns = np.arange(source.shape[1]).reshape(2, -1).T.reshape(-1).tolist()
        known[value] = initializer(f"{value.name}.interleaved", Picked(source, turns))
        graph.register_initializer(known[value])
    return known[value]
