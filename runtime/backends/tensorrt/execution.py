"""Calls of a TensorRT engine: shapes and addresses bound, arrays copied, calls that come back recorded and replayed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import Graph
from moevlm.runtime.backends.tensorrt.device_engine import DeviceEngine
from moevlm.runtime.backends.tensorrt.staging import Staging
from moevlm.runtime.core.dtypes import TENSORRT
from moevlm.runtime.core.errors import EngineError

HOST_DTYPES = {name: TENSORRT[name].numpy for name in ("FLOAT", "INT32", "INT64")}  # of arrays that a call takes
Shape = tuple[int, ...]


class Execution:
    """One context and its profile. Used by one thread at a time, inside the device's context.

    Tensors are either bound to device memory of the caller, or are arrays of the host that each call copies.
    arrays: these, by name, inputs and outputs, in pinned memory; their dtypes are the engine's.
    """

    def __init__(self, engine: DeviceEngine, profile: int, fixed: bool = False) -> None:
        """fixed: whether all calls have the same shapes."""
        self._engine, self._device = engine, engine.device
        self._context = context = engine.context(fixed)
        self._staging = Staging(engine.device)
        self._bound: dict[str, tuple[int, Shape]] = {}
        self._shapes: dict[str, Shape] = {}
        self._graph: Graph | None = None
        self._refusal: str | None = None
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise engine.refused(f"select profile {profile}")
        if (scratch := engine.scratch) is not None:
            context.set_device_memory(scratch.address, scratch.size)

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        return self._staging.arrays

    @property
    def graph_refused(self) -> str | None:
        """Why `record` recorded nothing; None if it did, or was not asked."""
        return self._refusal

    @property
    def recorded(self) -> bool:
        """Whether a call is one launch."""
        return self._graph is not None

    def bind(self, name: str, address: int, shape: Shape) -> None:
        """Where a tensor lies that is no array. An output's shape is that which follows from the inputs."""
        if self._bound.get(name) == (address, shape):
            return
        self.forget_graph()
        if name in self._engine.inputs and not self._context.set_input_shape(name, shape):
            raise self._engine.refused(f"take {name} of shape {shape}")
        if not self._context.set_tensor_address(name, address):
            raise self._engine.refused(f"bind {name}")
        self._bound[name] = address, shape

    def arrange(self, shapes: Mapping[str, Shape]) -> None:
        """Make arrays of these shapes for inputs, and of the shapes that follow for outputs that are not bound.

        What the arrays held before is lost where a shape has changed. All else has been bound. Raises EngineError.
        """
        if shapes == self._shapes:
            return
        self.forget_graph()
        self._shapes = {}
        for name, shape in shapes.items():
            self._bound.pop(name, None)
            if not self._context.set_input_shape(name, shape):
                raise self._engine.refused(f"take {name} of shape {shape}")
        outputs: dict[str, Shape] = {}
        for name in self._engine.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise EngineError(f"{self._engine.name}: the shape of {name} does not follow from its inputs: {shape}")
            bound = self._bound.get(name)
            if bound is None:
                outputs[name] = shape
            elif bound[1] != shape:
                raise EngineError(f"{self._engine.name} gives {name} of shape {shape} (expected: {bound[1]})")
        self._staging.arrange(
            *({name: (s, self._dtype(name)) for name, s in part.items()} for part in (shapes, outputs))
        )
        for name, address in self._staging.addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._engine.refused(f"bind {name}")
        self._shapes = dict(shapes)

    def run(self) -> None:
        """One call, to its end: inputs are taken from `arrays`, outputs put there. Raises EngineError."""
        try:
            if self._graph is not None:
                self._graph.launch()
            else:
                self._queue()
        finally:
            self._device.synchronize()

    def record(self) -> None:
        """Run once, as TensorRT asks before a recording, and have calls be one launch until something is bound anew."""
        self.forget_graph()
        self.run()
        library = self._engine.library
        library.forget_errors()
        if library.is_rtx and not self._context.is_stream_capturable(self._device.stream):
            self._refusal = "TensorRT-RTX says that this engine cannot be recorded"
            return
        try:
            self._graph = self._device.capture(self._queue)
        except EngineError as error:
            self._refusal = str(error)

    def forget_graph(self) -> None:
        """Calls are no launch any more."""
        graph, self._graph, self._refusal = self._graph, None, None
        if graph is not None:
            graph.free()

    def _queue(self) -> None:
        self._staging.copy_in()
        if not self._context.execute_async_v3(self._device.stream):
            raise self._engine.refused("run")
        self._staging.copy_out()

    def _dtype(self, name: str) -> np.dtype:
        dtype = self._engine.dtypes[name]
        if dtype not in HOST_DTYPES:
            raise EngineError(f"{self._engine.name} has {name} as {dtype} (allowed: {', '.join(HOST_DTYPES)})")
        return HOST_DTYPES[dtype]

    def close(self) -> None:
        try:
            self.forget_graph()
        finally:
            self._context = None
            self._staging.free()
