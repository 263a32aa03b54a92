"""A TensorRT engine on the device, and calls of it: shapes and addresses bound, arrays copied, decoding replayed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import Device, DeviceMemory, Graph
from moevlm.runtime.backends.tensorrt.kernel_cache import KernelCache
from moevlm.runtime.backends.tensorrt.library import Library
from moevlm.runtime.backends.tensorrt.staging import Staging
from moevlm.runtime.core.dtypes import TENSORRT
from moevlm.runtime.core.errors import EngineError

HOST_DTYPES = {name: TENSORRT[name].numpy for name in ("FLOAT", "INT32", "INT64")}  # of arrays that a call takes


class Plan:
    """A deserialised plan. inputs, outputs: shapes by name, -1 where a profile decides; dtypes: TensorRT's names.

    Contexts made from it share `scratch`, so they run one after the other.
    """

    def __init__(
        self, library: Library, device: Device, name: str, data: bytes, profiles: int, kernels: KernelCache
    ) -> None:
        """name: for errors. Raises EngineError if TensorRT refuses the plan or it has not that many profiles."""
        self.name = name
        self.device = device
        self.library = library
        self.scratch: DeviceMemory | None = None
        self._kernels = kernels
        trt = library.module
        self._engine = engine = library.deserialize(name, data)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.dtypes: dict[str, str] = {n: engine.get_tensor_dtype(n).name for n in names}
        modes = {n: engine.get_tensor_mode(n) for n in names}
        self.inputs, self.outputs = (
            {n: tuple(engine.get_tensor_shape(n)) for n in names if modes[n] == mode}
            for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
        )
        for n in names:
            if engine.get_tensor_location(n) != trt.TensorLocation.DEVICE:
                raise EngineError(f"{name} wants {n} in host memory")
        if engine.num_optimization_profiles != profiles:
            raise EngineError(f"{name} has {engine.num_optimization_profiles} profiles (allowed: {profiles})")

    @property
    def scratch_bytes(self) -> int:
        """What the largest profile needs."""
        engine = self._engine
        sizes = [engine.get_device_memory_size_for_profile_v2(i) for i in range(engine.num_optimization_profiles)]
        return max(sizes)

    def most(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape of an input in a profile."""
        return tuple(self._engine.get_tensor_profile_shape(name, profile)[2])

    def size(self, name: str) -> int:
        """Bytes of an input whose shape is fixed."""
        return math.prod(self.inputs[name]) * TENSORRT[self.dtypes[name]].bits // 8

    def execution(self, profile: int, graphs: bool = False) -> Execution:
        """A context for a profile. graphs: calls whose shapes stay are recorded once and replayed."""
        trt, strategy = self.library.module, self.library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.library.forget_errors()
        if self.library.is_rtx:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            # Few shapes come back for every token; of the many that prompts have, TensorRT compiles what recurs.
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if graphs else strategies.LAZY
            self._kernels.attach(config)
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self.library.refused(f"make a context for {self.name}")
        return Execution(self, context, profile, graphs)

    def close(self) -> None:
        self._engine = None


class Execution:
    """One context, its profile, and the arrays of its calls. Used by one thread at a time, inside the device's context.

    graph_refused: why calls are not replayed; None where they are, or have not come back yet.
    """

    def __init__(self, plan: Plan, context: Any, profile: int, graphs: bool) -> None:
        self._plan, self._device, self._context = plan, plan.device, context
        self._staging = Staging(plan.device)
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._graphs, self._warm = graphs, False
        self._graph: Graph | None = None
        self.graph_refused: str | None = None
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise self._refused(f"select profile {profile}")
        scratch = plan.scratch
        if scratch is not None:
            context.set_device_memory(scratch.address, scratch.size)

    def bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        """Where a tensor lies that is not an array of a call. Outputs take their shape from the inputs."""
        if self._bound.get(name) == (address, shape):
            return
        self._forget_graph()
        if name in self._plan.inputs and not self._context.set_input_shape(name, shape):
            raise self._refused(f"take {name} of shape {shape}")
        if not self._context.set_tensor_address(name, address):
            raise self._refused(f"bind {name}")
        self._bound[name] = address, shape

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs that are not bound, by name, after a call with these inputs. Raises EngineError."""
        layout = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        if layout != self._layout:
            self._arrange(layout)
        for name, array in arrays.items():
            self._staging.arrays[name][...] = array
        if self._graph is None and self._graphs and self._warm and self.graph_refused is None:
            self._record()
        try:
            if self._graph is not None:
                self._graph.launch()
            else:
                self._queue()
        finally:
            self._device.synchronize()
        self._warm = True
        return {name: self._staging.arrays[name].copy() for name in self._plan.outputs if name not in self._bound}

    def _arrange(self, layout: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        """New shapes: TensorRT is told them, and where the arrays lie now."""
        self._forget_graph()
        self._layout = {}
        for name, (shape, given) in layout.items():
            self._bound.pop(name, None)
            if given != HOST_DTYPES.get(self._plan.dtypes[name]):
                raise EngineError(f"{self._plan.name} takes {name} as {self._plan.dtypes[name]}, it was given {given}")
            if not self._context.set_input_shape(name, shape):
                raise self._refused(f"take {name} of shape {shape}")
        outputs: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for name in self._plan.outputs:
            if name not in self._bound:
                shape = tuple(self._context.get_tensor_shape(name))
                if min(shape, default=0) < 0:
                    raise EngineError(
                        f"{self._plan.name}: the shape of {name} does not follow from its inputs: {shape}"
                    )
                dtype = self._plan.dtypes[name]
                if dtype not in HOST_DTYPES:
                    raise EngineError(f"{self._plan.name} gives {name} as {dtype} (allowed: {', '.join(HOST_DTYPES)})")
                outputs[name] = shape, HOST_DTYPES[dtype]
        self._staging.arrange(layout, outputs)
        for name, address in self._staging.addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._refused(f"bind {name}")
        self._layout = layout

    def _queue(self) -> None:
        self._staging.copy_in()
        if not self._context.execute_async_v3(self._device.stream):
            raise self._refused("run")
        self._staging.copy_out()

    def _record(self) -> None:
        """Copies and kernels of one call as one graph. A call at these shapes has run before, as TensorRT asks."""
        self._plan.library.forget_errors()
        if self._plan.library.is_rtx and not self._context.is_stream_capturable(self._device.stream):
            self.graph_refused = "TensorRT-RTX says that this engine cannot be recorded"
            return
        try:
            self._graph = self._device.capture(self._queue)
        except EngineError as error:
            self.graph_refused = str(error)

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._graph.free()
        self._graph, self._warm, self.graph_refused = None, False, None

    def _refused(self, what: str) -> EngineError:
        return self._plan.library.refused(f"{what} in {self._plan.name}")

    @property
    def replays(self) -> bool:
        """Whether the next call of the same shapes is one launch."""
        return self._graph is not None

    def close(self) -> None:
        try:
            self._forget_graph()
        finally:
            self._context = None
            self._staging.free()
