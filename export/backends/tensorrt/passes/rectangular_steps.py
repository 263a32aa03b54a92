"""Steps of sequences that all have as many tokens, each in one page: the shape of step that plans are built for."""

from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.graph.builder import Builder
from moevlm.export.graph.op import is_op
from moevlm.export.graph.paged_attention import PAGED_ATTENTION, inputs_of
from moevlm.export.passes.base import Pass
from moevlm.runtime.core.errors import BuildError

INT32 = int(ir.DataType.INT32)


class RectangularSteps(Pass):
    """The packed inputs [T, ...] of a decoder -> [batch, sequence, ...], and its sequences -> cache_position [batch].

    Sequence n has the rows n * S to n * S + S, the first of them at cache_position[n], and page n of the caches, which
    become [batch, kv_heads, capacity, D]. Raises BuildError for a state that is no cache of PagedAttention.
    """

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """query_start, context_len and page_table are computed."""
        given = {value.name for value in model.graph.inputs} & {"query_start", "context_len", "page_table"}
        if given:
            yield f"the graph still has the inputs {sorted(map(str, given))}"

    def apply(self, model: ir.Model) -> int:
        graph = model.graph
        given = {str(value.name): value for value in graph.inputs}
        recurrent = [name for name, value in given.items() if _first_size(value) == "rows"]
        if recurrent:
            raise BuildError(f"a TensorRT plan cannot keep {recurrent[0]} (supported: caches of keys and values)")
        if "page_table" not in given:
            return 0
        b = Builder(graph, next(iter(graph)), "steps")
        packed = [value for value in given.values() if _first_size(value) == "tokens"]
        for value in packed:
            _widen(b, value)
        sequence = b.op("Shape", graph.inputs[0], start=1, end=2)
        position = ir.Value(name="cache_position", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
        batch = b.op("Squeeze", b.op("Shape", position))
        numbers = b.op("Range", b.integer(0), batch, b.integer(1))
        boundaries = b.op("Range", b.integer(0), b.op("Add", batch, b.integer(1)), b.integer(1))
        made = {
            "query_start": b.op("Mul", boundaries, sequence),
            "context_len": position,
            "page_table": b.op("Unsqueeze", numbers, b.integers(1)),
        }
        place = graph.inputs.index(given["query_start"])
        graph.inputs.insert(place, position)
        for name, value in made.items():
            given[name].replace_all_uses_with(b.op("Cast", value, to=INT32))
            graph.inputs.remove(given[name])
        for value in (*graph.inputs, *graph.outputs):
            if value.shape is not None and _first_size(value) == "pages":
                value.shape = ir.Shape(["batch", value.shape[1], "capacity", value.shape[3]])
        return len(packed)


def _widen(b: Builder, value: ir.Value) -> None:
    """The rows of a new input [batch, sequence, ...] in the place of an input [T, ...]."""
    assert value.shape is not None
    rest = [size for size in value.shape[1:] if isinstance(size, int)]  # all: tokens are the open dimension
    wide = ir.Value(name=value.name, shape=ir.Shape(["batch", "sequence", *rest]), type=value.type)
    b.graph.inputs[b.graph.inputs.index(value)] = wide
    rows = b.op("Reshape", wide, b.integers(-1, *rest))
    rows.shape, rows.type = value.shape, value.type
    value.replace_all_uses_with(rows)


def paged(model: ir.Model) -> Iterator[str]:
    """A line if `RectangularSteps` has not run, where it has anything to do."""
    if any(value.name == "page_table" for value in model.graph.inputs):
        yield "steps are packed, their caches in pages"


def _first_size(value: ir.Value) -> str:
    return str(value.shape[0]) if value.shape else ""


def rectangle(rows: ir.Value | None) -> ir.Value:
    """The input [batch, sequence, ...] that `rows` are the rows of."""
    return _source(rows, "Reshape")


def cache_position(attention: ir.Node) -> ir.Value:
    """The input from which the sequences of a PagedAttention node were computed."""
    assert is_op(attention, PAGED_ATTENTION)
    return _source(inputs_of(attention).context_len, "Cast")


def _source(value: ir.Value | None, op_type: str) -> ir.Value:
    node = value.producer() if value is not None else None
    assert node is not None and node.op_type == op_type and node.inputs[0] is not None
    return node.inputs[0]
