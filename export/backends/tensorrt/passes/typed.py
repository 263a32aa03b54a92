"""The float32 graph in the dtype of a GPU's matrix units, every conversion a node of its own."""

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from moevlm.export.formats.stored import narrowed
from moevlm.export.graph.gated_delta import GATED_DELTA
from moevlm.export.graph.head import behind_head
from moevlm.export.graph.moe_functions import EXPERTS, ROUTER, routes
from moevlm.export.graph.op import is_op
from moevlm.export.graph.paged_attention import PAGED_ATTENTION, caches
from moevlm.export.graph.segment_attention import SEGMENT_ATTENTION
from moevlm.export.graph.weights import initializer, weight_of
from moevlm.export.passes.base import Pass, left
from moevlm.plugins.ops.spec import DOMAIN
from moevlm.runtime.core.dtypes import DTYPES

FLOAT = ir.DataType.FLOAT
FEATURES = ("visual_embeds", "deepstack_embeds")  # of images: outputs of the vision graph, inputs of the decoder
# By op: inputs that stay float32. Rotary tables, as rotation is done in float32, and gains of norms and sinks, whose
# kernels compute in it; the weights of the choice; the experts' own, which the next pass stores in its way; weights of
# the delta rule, and states, in which rounding would add up.
_EXACT_INPUTS = {
    PAGED_ATTENTION: (3, 4, 10, 11, 12),
    SEGMENT_ATTENTION: (3, 4),
    EXPERTS: (2, 3, 4, 5, 6),
    GATED_DELTA: (3, 4, 5, 6, 7),
}
_EXACT_OUTPUTS = {GATED_DELTA: (1, 2)}


class Typed(Pass):
    """Weights and activations in `dtype`; router logits, routing, rotary tables, norms of heads, recurrent states and a
    softcap of the logits in float32.

    Caches and features of images become `dtype`; other float32 inputs and outputs of the graph stay so, behind a Cast.
    Weights are cast as they are written; one that float16 cannot hold raises BuildError then. A router's logits are
    computed in float32: experts at a near tie then change places for the model's reasons only, and the matrix is small.
    Without exact_router only the sum is widened: TensorRT has no float32 products for SM75.
    """

    def __init__(self, dtype: str, exact_router: bool = True) -> None:
        self.dtype, self.exact_router = ir.DataType(DTYPES[dtype].onnx), exact_router

    def requires(self, model: ir.Model) -> Iterator[str]:
        """The moevlm ops are still there; there is no other subgraph."""
        yield from left(model, "of other domains", lambda node: node.domain not in ("", DOMAIN))
        yield from left(model, "with a subgraph", _has_subgraph)

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """All float inputs of a standard op have one dtype, and the caches and what experts read have `dtype`."""
        yield from untyped(model)
        for node in (node for node in model.graph if is_op(node, PAGED_ATTENTION)):
            for cache, _ in caches(node):
                if cache.dtype is not self.dtype:
                    yield f"{cache.name} is {cache.dtype}"
        yield from other_experts(model, self.dtype)

    def apply(self, model: ir.Model) -> int:
        graph, known = model.graph, dict[tuple[ir.Value, ir.DataType], ir.Value]()
        nodes, exact = list(graph), set(behind_head(graph))
        kept = [pair for node in nodes if is_op(node, PAGED_ATTENTION) for pair in caches(node)]
        features = [value for value in graph.inputs if value.name in FEATURES]
        for given in (*(cache for cache, _ in kept), *features):
            given.type = ir.TensorType(self.dtype)
        for node in nodes:
            own = FLOAT if node in exact else self._dtype_of(node)
            for i, value in enumerate(node.inputs):
                if value is None or value.dtype not in (FLOAT, self.dtype):
                    continue
                wanted = FLOAT if own is FLOAT or i in _of(node, _EXACT_INPUTS) else own
                if value.dtype is not wanted:
                    if (value, wanted) not in known:
                        known[value, wanted] = _converted(graph, node, value, wanted)
                    node.replace_input_with(i, known[value, wanted])
            for i, made in enumerate(node.outputs):
                if made.dtype is FLOAT and i not in _of(node, _EXACT_OUTPUTS):
                    made.type = ir.TensorType(own)
        written = [cache for _, cache in kept]
        written += [node.outputs[i] for node in nodes for i in _of(node, _EXACT_OUTPUTS)]
        for i, out in enumerate(graph.outputs):
            if out.dtype is self.dtype and out.name not in FEATURES and all(out is not state for state in written):
                graph.outputs[i] = _widened(graph, out)
        return len(nodes)

    def _dtype_of(self, node: ir.Node) -> ir.DataType:
        if is_op(node, ROUTER) or (self.exact_router and any(map(routes, node.outputs))):
            return FLOAT
        data = node.inputs[0] if node.op_type == "Gather" else None
        # Rows of an input are converted after they are picked.
        return FLOAT if data is not None and data.dtype is FLOAT and not data.is_initializer() else self.dtype


def untyped(model: ir.Model) -> Iterator[str]:
    """A line if the floating-point inputs of a standard op differ in dtype, as they do before `Typed`."""
    floats = (FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    for node in (node for node in model.graph if not node.domain):
        dtypes = {value.dtype for value in node.inputs if value is not None and value.dtype in floats}
        if len(dtypes) > 1:
            yield f"the inputs of {node.op_type} {node.outputs[0].name} are {sorted(str(dtype) for dtype in dtypes)}"


def other_experts(model: ir.Model, dtype: ir.DataType) -> Iterator[str]:
    """A line for each moevlm::MoEExperts whose tokens are of another dtype."""
    for node in (node for node in model.graph if is_op(node, EXPERTS)):
        if (x := node.inputs[0]) is not None and x.dtype is not dtype:
            yield f"{node.outputs[0].name} reads {x.dtype}"


def _has_subgraph(node: ir.Node) -> bool:
    return any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())


def _of(node: ir.Node, exact: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return exact.get(node.op_type, ()) if is_op(node, node.op_type) else ()


def _converted(graph: ir.Graph, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    if value.is_initializer():
        name = f"{value.name}.{dtype.name.lower()}"
        made = initializer(name, narrowed(weight_of(value), dtype.numpy()))
        graph.register_initializer(made)
        return made
    node = _cast(value, dtype)
    graph.insert_before(before, node)
    return node.outputs[0]


def _widened(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A float32 graph output in the place of `value`, under its name."""
    name, value.name = value.name, f"{value.name}.narrow"
    node = _cast(value, FLOAT)
    node.outputs[0].name = name
    graph.append(node)
    return node.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    out = ir.Value(shape=value.shape, type=ir.TensorType(dtype))
    return ir.node("Cast", [value], {"to": int(dtype)}, outputs=[out])
