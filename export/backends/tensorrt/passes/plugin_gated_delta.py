"""The gated delta rule as a TensorRT plugin."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.backends.tensorrt.passes.plugin import PluginPass, Programs, rounded, side_by_side
from moevlm.export.graph.gated_delta import GATED_DELTA
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.graph.weights import weight_of
from moevlm.export.passes.base import left
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.ops.gated_delta import GatedDeltaOp
from moevlm.runtime.core.errors import BuildError


class PluginGatedDelta(PluginPass):
    """moevlm::GatedDelta -> a plugin on rows of qkv, a and b side by side, which writes into the states it is given.

    What else a row has stays where it is, see `PackDelta`.
    States are inputs of the graph and no outputs: [rows, ...] float32.
    """

    def __init__(self, dtype: str, programs: Programs) -> None:
        """dtype: of activations."""
        super().__init__(programs)
        self.dtype = dtype

    def requires(self, model: ir.Model) -> Iterator[str]:
        """Weights of the op's own and states are float32."""
        for node in filter(self.matches, model.graph):
            yield from rounded(node.inputs[3:8])

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """No moevlm::GatedDelta is left, and no state is an output."""
        yield from left(model, GATED_DELTA, self.matches)
        for value in model.graph.outputs:
            if "_state_out." in str(value.name):
                yield f"{value.name} is an output"

    def apply(self, model: ir.Model) -> int:
        """Raises BuildError for a recurrent state of another op."""
        for value in model.graph.inputs:
            if value.shape and str(value.shape[0]) == "rows" and not all(map(self.matches, value.consumers())):
                allowed = "caches of keys and values, states of the gated delta rule"
                raise BuildError(f"a TensorRT engine cannot keep {value.name} (supported: {allowed})")
        return super().apply(model)

    def matches(self, node: ir.Node) -> bool:
        return is_op(node, GATED_DELTA)

    def described(self, graph: ir.Graph, node: ir.Node) -> tuple[KernelOp, list[ir.Value]]:
        values, spec = [value for value in node.inputs if value is not None], node_spec(node)
        rows = _rows_of(*values[:3])
        if rows is None:
            return GatedDeltaOp(spec, self.dtype), [side_by_side(graph, node, values[:3]), *values[3:]]
        columns = _columns(rows)
        return GatedDeltaOp(spec, self.dtype, columns - spec.channels - 2 * spec.value_heads), [rows, *values[3:]]

    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        for written in node.outputs[1:]:
            graph.outputs.remove(written)
        node.resize_outputs(1)
        super().replace(graph, node)


def _rows_of(*parts: ir.Value) -> ir.Value | None:
    """The product that was split into `parts` and others behind them, see `PackDelta`."""
    split = parts[0].producer()
    if split is None or split.op_type != "Split" or tuple(split.outputs[: len(parts)]) != parts:
        return None
    return split.inputs[0]


def _columns(rows: ir.Value) -> int:
    """Of a Gemm's result."""
    product = rows.producer()
    assert product is not None and product.inputs[1] is not None
    return weight_of(product.inputs[1]).shape[0]
