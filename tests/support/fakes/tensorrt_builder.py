"""A strict stand-in for TensorRT's builder, in its versions; `tensorrt_runtime` is the one for its runtime.

Anything that the real module of that version lacks is an AttributeError here, too. Calls are recorded.
Sources: NVIDIA's Python API reference, 10.15 and 11.4.
"""

import enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support.fakes.tensorrt_runtime import Severity

PLAN = b"ptrt" + bytes(12) + (64).to_bytes(8, "little") + bytes([10, 15, 0, 1]) + bytes(36)


class LayerType(enum.Enum):
    MATRIX_MULTIPLY = 1
    PLUGIN_V3 = 2


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class OnnxParserFlag(enum.Enum):
    NATIVE_INSTANCENORM = 0
    ENABLE_PLUGIN_OVERRIDE = 4


def builder_flags(major: int) -> type[enum.Enum]:
    kept = (
        "DEBUG",
        "REFIT",
        "TF32",
        "SPARSE_WEIGHTS",
        "VERSION_COMPATIBLE",
        "EXCLUDE_LEAN_RUNTIME",
        "WEIGHT_STREAMING",
    )
    gone = ("FP16", "INT8", "BF16", "FP8", "PREFER_PRECISION_CONSTRAINTS")  # with weak typing, in 11
    return enum.Enum("BuilderFlag", kept if major > 10 else kept + gone)  # type: ignore[return-value]


class ILogger:
    Severity = Severity


class IProgressMonitor:
    def __init__(self) -> None: ...


class IStreamWriter:
    def __init__(self) -> None: ...


class _Profile:
    __slots__ = ("shapes",)

    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self.shapes[input] = (tuple(min), tuple(opt), tuple(max))


class _Config:
    """No compute capabilities: those are TensorRT-RTX's."""

    __slots__ = ("flags_cleared", "flags_set", "profiles", "progress_monitor")

    def __init__(self) -> None:
        self.flags_set: list[str] = []
        self.flags_cleared: list[str] = []
        self.profiles: list[_Profile] = []
        self.progress_monitor: Any = None

    def set_flag(self, flag: enum.Enum) -> None:
        self.flags_set.append(flag.name)

    def clear_flag(self, flag: enum.Enum) -> None:
        self.flags_cleared.append(flag.name)

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class _Layer:
    __slots__ = ("type",)

    def __init__(self, kind: LayerType) -> None:
        self.type = kind


class _Network:
    __slots__ = ("flags", "layers")

    def __init__(self, flags: int) -> None:
        self.flags, self.layers = flags, list[_Layer]()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> _Layer:
        return self.layers[index]


class _Error:
    __slots__ = ()

    def desc(self) -> str:
        return 'Assertion failed: mode == "linear"\n'

    def node_name(self) -> str:
        return "layers.0.scatter"

    def node_operator(self) -> str:
        return "TensorScatter"


class _Registry:
    __slots__ = ("module",)

    def __init__(self, module: "FakeTensorRT") -> None:
        self.module = module

    def load_library(self, plugin_path: str) -> object | None:
        self.module.libraries.append(plugin_path)
        return object() if Path(plugin_path).exists() else None


class FakeTensorRT(ModuleType):
    """plugin_layers: of the networks that it parses. refuses: "parse" or "build"."""

    def __init__(self, version: str, plugin_layers: int = 0, refuses: str = "") -> None:
        super().__init__("tensorrt")
        self.__spec__ = ModuleSpec("tensorrt", None)
        self.__version__ = version
        major = int(version.partition(".")[0])
        self.networks: list[_Network] = []
        self.configs: list[_Config] = []
        self.libraries: list[str] = []
        self.parsed: list[str] = []
        self.ILogger, self.IProgressMonitor, self.LayerType = ILogger, IProgressMonitor, LayerType
        self.NetworkDefinitionCreationFlag, self.OnnxParserFlag = NetworkDefinitionCreationFlag, OnnxParserFlag
        self.BuilderFlag = builder_flags(major)
        module = self

        class Builder:
            __slots__ = ("logger",)

            def __init__(self, logger: ILogger) -> None:
                self.logger = logger

            def create_network(self, flags: int = 0) -> _Network:
                module.networks.append(_Network(flags))
                return module.networks[-1]

            def create_builder_config(self) -> _Config:
                module.configs.append(_Config())
                return module.configs[-1]

            def create_optimization_profile(self) -> _Profile:
                return _Profile()

            def build_serialized_network_to_stream(self, network: _Network, config: _Config, writer: Any) -> bool:
                assert isinstance(writer, IStreamWriter)
                # Without the flag a 10.x network is weakly typed, and takes no bfloat16 from ONNX as it is.
                assert major > 10 or network.flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
                config.progress_monitor.phase_start("Building", None, 2)
                assert config.progress_monitor.step_complete("Building", 0) is True
                config.progress_monitor.phase_finish("Building")
                if refuses == "build":
                    self.logger.log(Severity.WARNING, "this is only a warning")
                    self.logger.log(Severity.ERROR, "Error Code 9:\n no kernel")
                    return False
                return all(writer.write(part) == len(part) for part in (PLAN[:40], PLAN[40:]))

        class OnnxParser:
            __slots__ = ("flags", "network", "num_errors")

            def __init__(self, network: _Network, logger: ILogger) -> None:  # noqa: ARG002
                self.network, self.flags, self.num_errors = network, list[OnnxParserFlag](), 0

            def set_flag(self, flag: OnnxParserFlag) -> None:
                self.flags.append(flag)

            def parse_from_file(self, model: str) -> bool:
                assert Path(model).is_file()
                module.parsed.append(model)
                self.num_errors = int(refuses == "parse")
                # Without the flag, a function's body or a standard op of that name would be taken.
                plugins = plugin_layers if OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE in self.flags else 0
                kinds = [LayerType.MATRIX_MULTIPLY, *[LayerType.PLUGIN_V3] * plugins]
                self.network.layers.extend(map(_Layer, kinds))
                return refuses != "parse"

            def get_error(self, index: int) -> _Error:
                assert index < self.num_errors
                return _Error()

        self.OnnxParser = OnnxParser
        self.IStreamWriter, self.Builder = IStreamWriter, Builder

    def get_plugin_registry(self) -> _Registry:
        return _Registry(self)
