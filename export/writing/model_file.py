"""An ONNX model as two files: the graph, and one data file into which every large initializer is streamed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moevlm.export.graph.weights import WeightTensor
from moevlm.export.writing.streamed_file import StreamedFile
from moevlm.runtime.core.errors import ExportError
from moevlm.runtime.core.progress import Progress

INLINE_BYTES = 1024  # initializers up to this size stay in the graph file
PAGE = 4096  # large tensors begin at a page, so that ONNX Runtime can map them


@dataclass(frozen=True)
class Span:
    """Where an initializer's bytes lie in the data file."""

    tensor: ir.TensorProtocol
    offset: int
    length: int


def plan(model: ir.Model) -> dict[ir.Value, Span]:
    """A place in the data file for every initializer above INLINE_BYTES, of the graph and of its subgraphs.

    Initializers that share a tensor object, or a `Weight` object, share a place.
    """
    spans: dict[ir.Value, Span] = {}
    placed: dict[int, Span] = {}
    end = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                raise ExportError(f"initializer {value.name} has no value")
            if tensor.dtype == ir.DataType.STRING or tensor.nbytes <= INLINE_BYTES:
                continue
            key = id(tensor.weight if isinstance(tensor, WeightTensor) else tensor)
            if key not in placed:
                alignment = PAGE if tensor.nbytes >= 16 * PAGE else 64
                begin = -(-end // alignment) * alignment
                placed[key] = Span(tensor, begin, tensor.nbytes)
                end = begin + tensor.nbytes
            spans[value] = placed[key]
    return spans


def data_bytes(spans: Mapping[ir.Value, Span]) -> int:
    """The size of the data file."""
    return max((span.offset + span.length for span in spans.values()), default=0)


def write_data(spans: Mapping[ir.Value, Span], file: StreamedFile, progress: Progress | None = None) -> None:
    """Stream the tensors into the data file, a few slices in memory at a time.

    Raises ExportError when a weight yields other bytes than its shape and dtype say, BuildError when it cannot be what
    its recipe makes of it, OSError when writing fails.
    """
    total = data_bytes(spans)
    for span in sorted(set(spans.values()), key=lambda span: span.offset):
        file.pad_to(span.offset)
        for piece in _pieces(span.tensor):
            file.write(piece)
            if progress is not None:
                progress(file.size, total)
        if file.size != span.offset + span.length:
            raise ExportError(
                f"initializer {span.tensor.name} yielded {file.size - span.offset} bytes, "
                f"its type {span.tensor.dtype} {list(span.tensor.shape)} has {span.length}"
            )


def _pieces(tensor: ir.TensorProtocol) -> Iterator[np.ndarray | bytes]:
    if isinstance(tensor, WeightTensor):
        for piece in tensor.pieces():
            if piece.dtype != tensor.weight.dtype:
                raise ExportError(f"initializer {tensor.name} yielded {piece.dtype}, it says {tensor.weight.dtype}")
            yield piece
    else:
        yield tensor.tobytes()


def graph_bytes(model: ir.Model, spans: Mapping[ir.Value, Span], location: str) -> bytes:
    """The serialized model, its planned initializers pointing into the file `location` beside it.

    Raises what reading a small initializer raises, and ExportError for a graph that is too large.
    """
    with _stored(model, spans, location):
        proto = ir.to_proto(model)
    try:
        return proto.SerializeToString(deterministic=True)
    except ValueError as error:  # protobuf's limit of 2 GiB
        raise ExportError(f"the graph {model.graph.name} is too large for one ONNX file: {error}") from error


@contextmanager
def _stored(model: ir.Model, spans: Mapping[ir.Value, Span], location: str) -> Iterator[None]:
    """While it lasts, every initializer is either a reference into `location` or in memory.

    Small lazy ones are read here: the serializer would wrap an error of theirs in one of its own. The model is as it
    was afterwards.
    """
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    originals = {value: value.const_value for value in values if value.const_value is not None}
    try:
        for value, original in originals.items():
            if value in spans:
                value.const_value = _external(value, original, spans[value], location)
            elif isinstance(original, WeightTensor):
                value.const_value = ir.Tensor(original.numpy(), name=original.name)
        yield
    finally:
        for value, original in originals.items():
            value.const_value = original


def _external(value: ir.Value, original: ir.TensorProtocol, span: Span, location: str) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        span.offset,
        span.length,
        original.dtype,
        shape=ir.Shape(original.shape.numpy()),
        name=value.name or "",
        doc_string=original.doc_string,
        metadata_props=dict(original.metadata_props),
    )
