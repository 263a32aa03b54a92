"""A TensorRT engine of a bundle on the device, and the contexts that run it."""

from __future__ import annotations

import math
from typing import Any

from moevlm.runtime.backends.tensorrt.cuda import Device, DeviceMemory
from moevlm.runtime.backends.tensorrt.kernel_cache import KernelCache
from moevlm.runtime.backends.tensorrt.library import Library
from moevlm.runtime.core.dtypes import TENSORRT
from moevlm.runtime.core.errors import EngineError


class DeviceEngine:
    """A deserialised engine. inputs, outputs: shapes by name, -1 where a profile decides; dtypes: TensorRT's names.

    Contexts made from it share `scratch`, so they run one after the other.
    """

    def __init__(
        self, library: Library, device: Device, name: str, data: bytes, profiles: int, kernels: KernelCache
    ) -> None:
        """name: for errors. Raises EngineError if TensorRT refuses the engine or it has not that many profiles."""
        self.name = name
        self.device = device
        self.library = library
        self.scratch: DeviceMemory | None = None
        self._kernels = kernels
        trt = library.module
        self._engine: Any = library.deserialize(name, data)
        engine = self._engine
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

    def context(self, fixed: bool) -> Any:
        """A context of TensorRT's, whose calls have fixed shapes, or any."""
        trt, strategy = self.library.module, self.library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.library.forget_errors()
        if self.library.is_rtx:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            # Fixed shapes come back for every token; of the many that prompts have, TensorRT compiles what recurs.
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if fixed else strategies.LAZY
            self._kernels.attach(config)
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self.library.refused(f"make a context for {self.name}")
        return context

    def refused(self, what: str) -> EngineError:
        """The error for a call that TensorRT refused, with its reason."""
        return self.library.refused(f"{what} in {self.name}")

    def close(self) -> None:
        self._engine = None
