"""What a fake engine computes: the graph that its plan names, on the memory that is bound."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime

from tests.support.fakes.cuda_driver import Driver, Work

Shapes = Mapping[str, tuple[int, ...]]
_NUMPY = {"FLOAT": np.float32, "INT32": np.int32, "INT64": np.int64}


class EngineEvaluation(Protocol):
    """Of a deserialised plan."""

    def scratch(self, profile: int) -> int:
        """Bytes that a context of a profile needs beside what is bound."""
        ...

    def output_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """By name. shapes: of the inputs that were told."""
        ...

    def context(self) -> ContextEvaluation: ...

    def close(self) -> None: ...


class ContextEvaluation(Protocol):
    """Of an execution context."""

    def enqueue(self, shapes: Shapes, addresses: Mapping[str, int], memory: tuple[int, int], stream: int) -> list[Work]:
        """The work of a call, in order, that may be done any number of times. shapes: of the inputs.

        addresses: of inputs and outputs. memory: the context's, address and size.
        """
        ...

    def close(self) -> None: ...


Evaluation = Callable[[Driver, dict[str, Any]], EngineEvaluation]  # of an engine, from what its plan says


class WholeGraph:
    """ONNX Runtime evaluates the graph at once. Its plan says the outputs' shapes, see `plan_bytes`."""

    def __init__(self, driver: Driver, plan: dict[str, Any]) -> None:
        self._driver, self._plan = driver, plan

    def scratch(self, profile: int) -> int:
        return 8192 >> profile

    def output_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        return {name: tuple(_size(dim, shapes) for dim in shape) for name, (_, shape) in self._plan["outputs"].items()}

    def context(self) -> WholeGraph:
        return self

    def enqueue(
        self,
        shapes: Shapes,
        addresses: Mapping[str, int],
        memory: tuple[int, int],  # noqa: ARG002
        stream: int,  # noqa: ARG002
    ) -> list[Work]:
        graph, outputs = Path(self._plan["graph"]), self._plan["outputs"]
        shapes = dict(shapes) | self.output_shapes(shapes)
        dtypes = {name: _NUMPY[tensor[0]] for name, tensor in (self._plan["inputs"] | outputs).items()}

        def view(name: str) -> np.ndarray:
            size = int(np.prod(shapes[name])) * np.dtype(dtypes[name]).itemsize
            return self._driver.view(addresses[name], size).view(dtypes[name]).reshape(shapes[name])

        def work() -> None:
            feeds = {name: view(name).copy() for name in self._plan["inputs"]}
            values = _session(str(graph), graph.stat().st_mtime_ns).run(list(outputs), feeds)
            for name, value in zip(outputs, values, strict=True):
                view(name)[...] = value

        return [work]

    def close(self) -> None:
        """Nothing to do."""


def _size(dim: Any, shapes: Shapes) -> int:
    if not isinstance(dim, list):
        return int(dim)
    source, axis, divisor = dim
    assert shapes[source][axis] % divisor == 0
    return shapes[source][axis] // divisor


@functools.cache
def _session(graph: str, modified: int) -> onnxruntime.InferenceSession:  # noqa: ARG001 - another file, another session
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # it would say that the fake copies its caches
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
