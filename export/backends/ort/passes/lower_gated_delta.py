"""The gated delta rule of one sequence on ONNX Runtime's kernels for it."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from moevlm.export.graph.builder import Builder
from moevlm.export.graph.gated_delta import GATED_DELTA
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.rearranged import reshape
from moevlm.export.graph.weights import PerRow, initializer, weight_of
from moevlm.export.passes.base import CONTRIB, NodePass, left
from moevlm.plugins.ops.spec import GatedDeltaSpec

_INT64 = int(ir.DataType.INT64)


class LowerGatedDelta(NodePass):
    """moevlm::GatedDelta -> com.microsoft::CausalConvWithState + com.microsoft::LinearAttention.

    A step has one sequence, whose row is read from both states and written into them.
    """

    domain = CONTRIB

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::GatedDelta is left."""
        yield from left(model, "of the gated delta rule", self.matches)

    def matches(self, node: ir.Node) -> bool:
        return is_op(node, GATED_DELTA)

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        b, spec = Builder(graph, node, "delta"), node_spec(node)
        qkv, a, beta, conv, rate, dt_bias, conv_state, delta_state, _, state_row = node.inputs
        first = b.integers(0)
        mixed, conv_row = b.ops(
            "CausalConvWithState",
            b.op("Unsqueeze", qkv, first),
            _depthwise(graph, conv),
            None,
            b.op("Gather", conv_state, state_row, axis=0),
            outputs=2,
            domain=CONTRIB,
            activation="silu",
            ndim=1,
            channels_last=1,
        )
        keys = spec.key_heads * spec.key_dim
        sizes = b.integers(keys, keys, spec.value_heads * spec.value_dim)
        q, k, v = b.ops("Split", mixed, sizes, outputs=3, axis=2)
        log_decay = b.op("Mul", b.op("Softplus", b.op("Add", a, dt_bias)), _negative(graph, rate))
        y, delta_row = b.ops(
            "LinearAttention",
            *(_of_length_one(b, q, spec), _of_length_one(b, k, spec), v),
            b.op("Gather", delta_state, state_row, axis=0),
            b.op("Unsqueeze", log_decay, first),
            b.op("Unsqueeze", b.op("Sigmoid", beta), first),
            outputs=2,
            domain=CONTRIB,
            q_num_heads=spec.key_heads,
            kv_num_heads=spec.value_heads,
            update_rule="gated_delta",
            scale=spec.scale,
        )
        place = b.op("Unsqueeze", b.op("Cast", state_row, to=_INT64), b.integers(1))
        states = [
            b.op("ScatterND", state, place, row) for state, row in ((conv_state, conv_row), (delta_state, delta_row))
        ]
        b.replace(node, [b.op("Squeeze", y, first), *states])


def _of_length_one(b: Builder, x: ir.Value, spec: GatedDeltaSpec) -> ir.Value:
    """[1, T, heads * Dk], each head divided by its Euclidean length."""
    heads = b.op("Reshape", x, b.integers(1, -1, spec.key_heads, spec.key_dim))
    squares = b.op("ReduceSumSquare", heads, b.integers(-1), keepdims=1)
    epsilon = b.array(f"epsilon_{spec.epsilon}", np.array(spec.epsilon, np.float32))
    unit = b.op("Div", heads, b.op("Sqrt", b.op("Add", squares, epsilon)))
    return b.op("Reshape", unit, b.integers(1, -1, spec.key_heads * spec.key_dim))


def _depthwise(graph: ir.Graph, weight: ir.Value | None) -> ir.Value:
    """[C, kernel] -> [C, 1, kernel]."""
    assert weight is not None
    recipe = weight_of(weight)
    made = initializer(f"{weight.name}.depthwise", reshape(recipe, (recipe.shape[0], 1, *recipe.shape[1:])))
    graph.register_initializer(made)
    return made


def _negative(graph: ir.Graph, rate: ir.Value | None) -> ir.Value:
    assert rate is not None
    recipe = weight_of(rate)
    made = initializer(f"{rate.name}.negative", PerRow(recipe, recipe.shape, recipe.dtype, np.negative))
    graph.register_initializer(made)
    return made
