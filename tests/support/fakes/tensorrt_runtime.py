"""A strict stand-in for the runtime of tensorrt_rtx.

A plan of it names an ONNX graph; what evaluates it on the bound buffers is a parameter.
It has no name that the real module lacks, and refuses what the real one leaves undefined: wrong addresses, shapes
outside of the profile, contexts changed after they were recorded.
"""

from __future__ import annotations

import enum
import itertools
import json
import struct
import weakref
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from moevlm.runtime.core.names import PLUGINS
from tests.support.fakes.cuda_driver import Driver, Work
from tests.support.fakes.evaluation import Evaluation, WholeGraph

HEADER_BYTES = 64
SM_BITS = {75: 1, 80: 2, 86: 4, 89: 8, 120: 16, 121: 32}
VERSION = "1.7.1.116"
CACHE_MAGIC = b"kernels of the fake\n"
CAPSULE = object()


def plan_bytes(
    graph: Path, inputs: dict[str, Any], outputs: dict[str, Any], profiles: int, sms: list[int], **more: Any
) -> bytes:
    """A plan as the fake reads it. inputs: name to (DataType, shape, [max shape of each profile]); outputs: name to
    (DataType, shape), where a dimension may be [input, axis, divisor] or [input, axis, divisor, factor, less]: that is
    (size - less) / divisor * factor. more: what the evaluation wants to know.
    """
    body = {"graph": str(graph), "inputs": inputs, "outputs": outputs, "profiles": profiles, "sms": sms, **more}
    data = json.dumps(body).encode()
    header = bytearray(HEADER_BYTES)
    header[:4] = header[28:32] = b"vtrt"
    header[24:28] = bytes(map(int, VERSION.split(".")))
    struct.pack_into("<Q", header, 16, HEADER_BYTES + len(data))
    struct.pack_into("<I", header, 32, sum(SM_BITS[sm] for sm in sms))
    return bytes(header) + data


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4 = range(10)


class TensorIOMode(enum.IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.IntEnum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
    LAZY, EAGER, NONE = range(3)


def fake_module(driver: Driver, evaluation: Evaluation = WholeGraph) -> ModuleType:
    """The module, on a fake driver. Beside the real one's names it has `alive` and `state`, for the tests."""
    module = ModuleType("tensorrt_rtx")
    faults = driver.faults
    state: dict[str, Any] = {"capturable": True, "record": True, "compiled": [], "libraries": [], "deserialized": 0}
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def log(message: str) -> None:
        state["logger"].log(Severity.ERROR, message + "\nIn some file")

    def current() -> None:
        assert driver.retained, "no device: some TensorRT libraries crash here"
        assert driver._stack(), "no current context"

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity
        Severity = Severity

        def __init__(self) -> None:
            state["logger"] = self

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class Runtime:
        def __init__(self, logger: Any) -> None:
            current()
            assert logger is state["logger"], "TensorRT keeps the first logger"
            if faults.hit("Runtime"):
                raise RuntimeError("Runtime failed")
            alive.add(self)

        def __setattr__(self, name: str, value: Any) -> None:
            raise AssertionError(f"{name} = {value}: nothing of the runtime object is to be changed")

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            current()
            state["deserialized"] += 1
            if faults.hit("deserialize_cuda_engine") or serialized_engine[:4] != b"vtrt":
                log("this is no plan")
                return None
            return ICudaEngine(json.loads(serialized_engine[HEADER_BYTES:]))

    class ICudaEngine:
        def __init__(self, plan: dict[str, Any]) -> None:
            alive.add(self)
            self._plan = plan
            self._evaluation = evaluation(driver, plan)
            weakref.finalize(self, self._evaluation.close)
            self._tensors = {**plan["inputs"], **plan["outputs"]}
            self.num_io_tensors = len(self._tensors)
            self.num_optimization_profiles = plan["profiles"]

        def get_tensor_name(self, index: int) -> str:
            return list(self._tensors)[index]

        def get_tensor_dtype(self, name: str) -> Any:
            return DataType[self._tensors[name][0]]

        def get_tensor_mode(self, name: str) -> Any:
            return TensorIOMode.INPUT if name in self._plan["inputs"] else TensorIOMode.OUTPUT

        def get_tensor_location(self, name: str) -> Any:
            assert name in self._tensors
            return TensorLocation.DEVICE

        def get_tensor_shape(self, name: str) -> Any:
            return [-1 if isinstance(size, list) else size for size in self._tensors[name][1]]

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
            most = self._plan["inputs"][name][2][profile_index]
            return [[1] * len(most), most, most]

        def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
            return self._evaluation.scratch(profile_index)

        def create_runtime_config(self) -> Any:
            return IRuntimeConfig()

        def create_execution_context(self, runtime_config: Any = None) -> Any:
            current()
            if faults.hit("create_execution_context"):
                log("no context today")
                return None
            return IExecutionContext(self, runtime_config)

    class IRuntimeConfig:
        def __init__(self) -> None:
            self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
            self._strategy = ExecutionContextAllocationStrategy.STATIC
            self._cache: Any = None

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self._strategy = strategy

        def create_runtime_cache(self) -> Any:
            return IRuntimeCache()

        def set_runtime_cache(self, cache: Any) -> bool:
            self._cache = cache
            return not faults.hit("set_runtime_cache")

    class IRuntimeCache:
        def __init__(self) -> None:
            alive.add(self)
            self._kernels: set[str] = set()

        def deserialize(self, blob: bytes) -> bool:
            current()
            if faults.hit("deserialize") or not blob.startswith(CACHE_MAGIC):
                return False
            self._kernels = set(json.loads(blob[len(CACHE_MAGIC) :]))
            return True

        def serialize(self) -> Any:
            current()
            if faults.hit("serialize"):
                return None
            return memoryview(CACHE_MAGIC + json.dumps(sorted(self._kernels)).encode())

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
            alive.add(self)
            assert config._strategy == ExecutionContextAllocationStrategy.USER_MANAGED
            self._engine, self._config = engine, config  # as pybind keeps them
            self._plan = engine._plan
            self._evaluation = engine._evaluation.context()
            weakref.finalize(self, self._evaluation.close)
            self._profile: int | None = None
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._memory = (0, 0)
            self._version = itertools.count()
            self._changes = 0
            self._ran: tuple[Any, ...] | None = None

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            assert stream_handle in driver.streams
            if faults.hit("set_optimization_profile_async"):
                return False
            self._profile, self._shapes, self._changes = profile_index, {}, self._changes + 1
            kernel = f"{Path(self._plan['graph']).name} {profile_index}"
            if kernel not in self._config._cache._kernels:
                state["compiled"].append(kernel)
                self._config._cache._kernels.add(kernel)
            return profile_index < self._plan["profiles"]

        def set_device_memory(self, memory: int, size: int) -> None:
            needed = self._engine.get_device_memory_size_for_profile_v2(self._profile or 0)
            assert size >= needed
            assert memory % 256 == 0
            self._memory, self._changes = (memory, size), self._changes + 1

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            if faults.hit("set_input_shape"):
                return False
            _, wanted, most = self._plan["inputs"][name]
            fits = len(shape) == len(wanted) and all(
                size == w if w >= 0 else 1 <= size <= m
                for size, w, m in zip(shape, wanted, most[self._profile] if most else wanted, strict=True)
            )
            if not fits:
                log(f"{name} {shape} is outside of profile {self._profile}")
                return False
            if self._shapes.get(name) != tuple(shape):
                self._shapes[name], self._changes = tuple(shape), self._changes + 1
            return True

        def get_tensor_shape(self, name: str) -> Any:
            return list(self._shapes.get(name) or self._engine._evaluation.output_shapes(self._shapes)[name])

        def set_tensor_address(self, name: str, memory: int) -> bool:
            if faults.hit("set_tensor_address"):
                return False
            assert name in self._engine._tensors, name
            assert memory % 256 == 0
            if self._addresses.get(name) != memory:
                self._addresses[name], self._changes = memory, self._changes + 1
            return True

        def is_stream_capturable(self, stream: int) -> bool:
            assert stream in driver.streams
            return state["capturable"] and not faults.hit("is_stream_capturable")

        def execute_async_v3(self, stream_handle: int) -> bool:
            current()
            assert stream_handle in driver.streams
            capturing = driver.capturing is not None
            failed = faults.hit("execute_async_v3")
            if failed or (capturing and not state["record"]):
                driver.spoiled = capturing
                log("an operation is not permitted when stream is capturing" if capturing else "enqueue failed")
                return False
            missing = [name for name in self._engine._tensors if name not in self._addresses]
            assert not missing, f"no address for {missing}"
            unset = [name for name in self._plan["inputs"] if name not in self._shapes]
            assert not unset, f"no shape for {unset}"
            driver.view(*self._memory)
            if capturing:
                assert self._ran == (self._changes,), "recorded without a run at these shapes and addresses"
            else:
                self._ran = (self._changes,)
            context, addresses = weakref.ref(self), dict(self._addresses)
            queued = self._evaluation.enqueue(dict(self._shapes), addresses, self._memory, stream_handle)
            changes = self._changes

            def checked(work: Work) -> None:
                there = context()
                assert there is not None, "the context is gone"
                assert not capturing or there._changes == changes, "the context was changed after it was recorded"
                driver.view(*there._memory)
                work()

            for work in queued:
                driver.queue(stream_handle, partial(checked, work))
            return True

    class IPluginRegistry:
        def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
            assert version == "1"
            assert plugin_namespace == ""
            return object() if state["libraries"] and type in PLUGINS else None

        def load_library(self, plugin_path: str) -> Any:
            current()
            if faults.hit("load_library"):
                log(f"Unable to load library: {plugin_path}")
                return None
            assert not state["libraries"], "registered twice"
            state["libraries"].append(plugin_path)
            return CAPSULE

    registry = IPluginRegistry()
    names = (ILogger, Runtime, ICudaEngine, IRuntimeConfig, IRuntimeCache, IExecutionContext, IPluginRegistry)
    enums = (DataType, TensorIOMode, TensorLocation)
    strategies = (ExecutionContextAllocationStrategy, DynamicShapesKernelSpecializationStrategy)
    for value in (*names, *enums, *strategies):
        setattr(module, value.__name__, value)
    module.get_plugin_registry = lambda: registry  # type: ignore[attr-defined]
    module.__version__ = VERSION  # type: ignore[attr-defined]
    module.state, module.alive = state, alive  # type: ignore[attr-defined]
    return module
