"""What a fake engine computes: the graph that its plan names, on the memory that is bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tests.support.fakes.cuda_driver import Driver, Work
from tests.support.fakes.device_graph import DeviceTensor, run_graph

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
    """ONNX Runtime evaluates the graph at once. Its plan says the outputs' shapes, see `plan_bytes`.

    And `caches`, if it has any: inputs that are written, and the graph's outputs that they are written with.
    """

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
        plan, shapes = self._plan, dict(shapes) | self.output_shapes(shapes)
        tensors = {
            name: DeviceTensor(self._driver, addresses[name], shapes[name], _NUMPY[dtype])
            for name, (dtype, *_) in (plan["inputs"] | plan["outputs"]).items()
        }

        def work() -> None:
            run_graph(Path(plan["graph"]), tensors, plan["inputs"], plan["outputs"], plan.get("caches", {}))

        return [work]

    def close(self) -> None:
        """Nothing to do."""


def _size(dim: Any, shapes: Shapes) -> int:
    if not isinstance(dim, list):
        return int(dim)
    source, axis, divisor, factor, less = (*dim, 1, 0)[:5]
    size = shapes[source][axis] - less
    assert size % divisor == 0
    return size // divisor * factor
