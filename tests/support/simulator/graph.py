"""A graph lowered for TensorRT as TensorRT has it: plugins, and segments of standard operators between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from moevlm.export.backends.tensorrt.passes.plugin import DOMAIN


@dataclass(frozen=True)
class Segment:
    """Standard operators that are run at once."""

    session: onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        return dict(zip(self.outputs, self.session.run(list(self.outputs), feeds), strict=True))


@dataclass(frozen=True)
class PluginNode:
    """op: its name. program: see `plugins.gpu.program`."""

    name: str
    op: str
    program: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Graph:
    """steps: in an order in which they can be run. constants: initializers that plugins take, by name."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        self._model = onnx.shape_inference.infer_shapes(model)
        graph = self._model.graph
        self.inputs = tuple(value.name for value in graph.input)
        self.outputs = tuple(value.name for value in graph.output)
        self._types = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.steps = tuple(self._steps())
        wanted = {name for step in self.steps if isinstance(step, PluginNode) for name in step.inputs}
        self.constants = {
            name: numpy_helper.to_array(tensor) for name, tensor in self._initializers.items() if name in wanted
        }

    def dtype(self, name: str) -> np.dtype:
        """Of an input, an output, or a value between two steps."""
        kind = self._types[name].type.tensor_type.elem_type
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))

    def fixed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the inputs whose shape is always the same, by name."""
        shapes = {name: self._types[name].type.tensor_type.shape.dim for name in self.inputs}
        return {
            name: tuple(dim.dim_value for dim in dims)
            for name, dims in shapes.items()
            if all(dim.HasField("dim_value") for dim in dims)
        }

    def _steps(self) -> Iterator[Segment | PluginNode]:
        nodes = list(self._model.graph.node)
        used = {name: i for i, node in enumerate(nodes) for name in node.input}  # where last
        used |= dict.fromkeys(self.outputs, len(nodes))
        pending: list[onnx.NodeProto] = []
        for i, node in enumerate(nodes):
            if node.domain != DOMAIN:
                pending.append(node)
                continue
            if pending:
                yield self._segment(pending, {name for name, last in used.items() if last >= i})
                pending = []
            (program,) = (attribute.s for attribute in node.attribute if attribute.name == "program")
            yield PluginNode(node.name, node.op_type, program, tuple(node.input), tuple(node.output))
        if pending:
            yield self._segment(pending, set(self.outputs))

    def _segment(self, nodes: list[onnx.NodeProto], later: set[str]) -> Segment:
        """later: values that are wanted after it."""
        made = {name for node in nodes for name in node.output}
        taken = _unique(name for node in nodes for name in _reads(node) if name and name not in made)
        inputs = [name for name in taken if name not in self._initializers]
        outputs = [name for name in _unique(name for node in nodes for name in node.output) if name in later]
        graph = onnx.helper.make_graph(
            nodes,
            "segment",
            [self._types[name] for name in inputs],
            [self._types[name] for name in outputs],
            [self._initializers[name] for name in taken if name in self._initializers],
        )
        model = onnx.helper.make_model(
            graph, opset_imports=self._model.opset_import, functions=self._model.functions, ir_version=10
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return Segment(session, tuple(inputs), tuple(outputs))


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        assert attribute.type != onnx.AttributeProto.GRAPH, f"{node.name} has a graph of its own"


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
