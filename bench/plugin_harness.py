"""The TensorRT plugin library without TensorRT: `plugin_harness.cpp` plays its part.

Addresses are device pointers where a driver is, and whatever the driver's stand-in takes elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moevlm.plugins.gpu.sizes import Sizes, Tensor
from moevlm.runtime.core.dtypes import DTYPES

SOURCES = Path(__file__).parents[1] / "plugins" / "tensorrt"
INT8, INT32, CHAR = 3, 5, 6  # types of plugin fields
BUILD, RUNTIME = 0, 1  # phases
MAX_DIMS = 8


def compile_library(output: Path, driver: Path | None = None) -> Path:
    """The plugin library with other flags than the installed one: CXX and CXXFLAGS as usual.

    driver: what it loads in the place of libcuda.so.1.
    """
    sources = sorted(SOURCES.glob("*.cpp"))
    return _compile(sources, output, [f'-DMOEVLM_CUDA_DRIVER="{driver}"'] if driver else [])


def compile_harness(output: Path) -> Path:
    """The harness as a shared library."""
    return _compile([Path(__file__).with_suffix(".cpp")], output, [f"-I{SOURCES}"])


def compiler() -> str:
    """The C++ compiler that is used: CXX or g++."""
    return os.environ.get("CXX", "g++")


def _compile(sources: Sequence[Path], output: Path, flags: Sequence[str]) -> Path:
    common = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=default" if len(sources) == 1 else "-fvisibility=hidden"]
    common += [*flags, *os.environ.get("CXXFLAGS", "").split()]
    objects = [output.with_name(f"{output.stem}_{source.stem}.o") for source in sources]
    running = [
        subprocess.Popen([compiler(), *common, "-c", source, "-o", out])
        for source, out in zip(sources, objects, strict=True)
    ]
    if any([process.wait() for process in running]):
        raise RuntimeError(f"{compiler()} failed")
    subprocess.run([compiler(), *common, "-shared", *objects, "-o", output], check=True)
    return output


class PluginError(RuntimeError):
    """A call of the plugin failed; the text is what it logged."""


class Dims(ctypes.Structure):
    """A shape, as `abi.h` has it."""

    _fields_ = (("count", ctypes.c_int32), ("d", ctypes.c_int64 * MAX_DIMS))

    @classmethod
    def of(cls, shape: Sequence[int]) -> Dims:
        """Any number of dimensions up to MAX_DIMS."""
        return cls(len(shape), (ctypes.c_int64 * MAX_DIMS)(*shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """As a tuple."""
        return tuple(self.d[: self.count])


class TensorDesc(ctypes.Structure):
    """A tensor when an engine runs, as `abi.h` has it."""

    _fields_ = (("dims", Dims), ("type", ctypes.c_int32), ("format", ctypes.c_int32), ("scale", ctypes.c_float))

    @classmethod
    def of(cls, dtype: str, shape: Sequence[int], format: int = 0) -> TensorDesc:
        """format: 0 is linear."""
        return cls(Dims.of(shape), DTYPES[dtype].tensorrt_number, format, 1.0)


class DynamicTensorDesc(ctypes.Structure):
    """A tensor when an engine is built, as `abi.h` has it."""

    _fields_ = (("desc", TensorDesc), ("min", Dims), ("max", Dims), ("opt", Dims))

    @classmethod
    def of(cls, dtype: str, least: Sequence[int], most: Sequence[int], format: int = 0) -> DynamicTensorDesc:
        """Bounds of the shape in an optimization profile."""
        shape = [low if low == high else -1 for low, high in zip(least, most, strict=True)]
        return cls(TensorDesc.of(dtype, shape, format), Dims.of(least), Dims.of(most), Dims.of(most))


class Field(ctypes.Structure):
    """A plugin's attribute, as `abi.h` has it."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class Fields(ctypes.Structure):
    """A list of them."""

    _fields_ = (("count", ctypes.c_int32), ("fields", ctypes.POINTER(Field)))


@dataclass(frozen=True)
class Io:
    """What a plugin is told of its inputs and outputs: those of a program, for sizes from `least` to `most`."""

    inputs: Sequence[DynamicTensorDesc]
    outputs: Sequence[DynamicTensorDesc]

    @classmethod
    def of(cls, inputs: Sequence[Tensor], outputs: Sequence[Tensor], least: Sizes, most: Sizes | None = None) -> Io:
        """As the program has them. most: as least where it is None."""
        upper = least if most is None else most

        def described(tensors: Sequence[Tensor]) -> list[DynamicTensorDesc]:
            return [DynamicTensorDesc.of(t.dtype, t.at(least), t.at(upper)) for t in tensors]

        return cls(described(inputs), described(outputs))

    def arguments(self) -> tuple[object, ...]:
        """As C takes them."""
        return _array(DynamicTensorDesc, self.inputs) + _array(DynamicTensorDesc, self.outputs)

    def at_most(self) -> tuple[list[TensorDesc], list[TensorDesc]]:
        """As they are in an execution of the largest sizes."""

        def fixed(tensors: Sequence[DynamicTensorDesc]) -> list[TensorDesc]:
            return [TensorDesc(t.max, t.desc.type, t.desc.format, t.desc.scale) for t in tensors]

        return fixed(self.inputs), fixed(self.outputs)


def _array(kind: type[ctypes.Structure], items: Sequence[ctypes.Structure]) -> tuple[object, int]:
    return (kind * len(items))(*items), len(items)


class PluginLibrary:
    """The plugin library at `path`, played to by the harness at `harness`."""

    def __init__(self, path: Path, harness: Path, logger: int = 11) -> None:
        """logger: of TensorRT 10 or 11, or 0 for none."""
        self.c = ctypes.CDLL(str(harness))
        for name in ("library_open", "plugin_create", "plugin_clone", "plugin_attach"):
            getattr(self.c, name).restype = ctypes.c_void_p
        for name in ("take_messages", "field_names", "plugin_identity", "library_error", "library_ops"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.c.plugin_workspace.restype = ctypes.c_size_t
        self.c.plugin_fields.restype = ctypes.POINTER(Fields)
        self.handle = ctypes.c_void_p(self.c.library_open(os.fsencode(path)))
        if not self.handle:
            raise PluginError(self.messages())
        self.set_logger(logger)

    def set_logger(self, version: int) -> None:
        """See __init__."""
        self.c.library_set_logger(self.handle, version)

    def messages(self) -> str:
        """What this thread's calls logged since the last time."""
        return self.c.take_messages().decode(errors="replace").rstrip("\n")

    def last_error(self) -> str:
        """What the library keeps as this thread's last error."""
        return self.c.library_error(self.handle).decode(errors="replace")

    def ops(self) -> tuple[str, ...]:
        """Names of its plugins."""
        return tuple(self.c.library_ops(self.handle).decode().splitlines())

    def field_names(self, op: str) -> list[str]:
        """Of the attributes that TensorRT's parsers look for."""
        return self.c.field_names(self.handle, op.encode()).decode().splitlines()

    def plugin(
        self, op: str, program: bytes | None, kind: int = INT8, phase: int = RUNTIME, name: str = "program"
    ) -> Plugin:
        """A plugin of an engine. program: `Program.to_bytes()`, or None for no attribute at all."""
        fields = [] if program is None else [Field(name.encode(), _address(program), kind, len(program))]
        count = len(fields)
        collection = Fields(count, (Field * count)(*fields))
        return Plugin(self, self.c.plugin_create(self.handle, op.encode(), ctypes.byref(collection), phase))


def _address(data: bytes) -> int | None:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value


class Plugin:
    """A plugin as TensorRT has it. Raises PluginError where TensorRT would fail."""

    def __init__(self, library: PluginLibrary, pointer: int | None) -> None:
        if not pointer:
            raise PluginError(library.messages())
        self.library, self.pointer = library, ctypes.c_void_p(pointer)

    def close(self) -> None:
        """Destroy it. It is an error to use it afterwards."""
        self.library.c.plugin_destroy(self.pointer)
        self.pointer = ctypes.c_void_p()

    def _check(self, status: int) -> None:
        if status:
            raise PluginError(self.library.messages())

    def identity(self) -> list[str]:
        """Name, version, namespace, and the kinds of its four interfaces."""
        return self.library.c.plugin_identity(self.pointer).decode().splitlines()

    def clone(self) -> Plugin:
        """A copy, as the builder makes them."""
        return Plugin(self.library, self.library.c.plugin_clone(self.pointer))

    def attach(self) -> Plugin:
        """The plugin of an execution context."""
        return Plugin(self.library, self.library.c.plugin_attach(self.pointer))

    def serialized(self) -> list[tuple[str, int, bytes]]:
        """What an engine keeps of it: name, type and bytes of each field."""
        fields = self.library.c.plugin_fields(self.pointer).contents
        items = [fields.fields[i] for i in range(fields.count)]
        return [(item.name.decode(), item.type, ctypes.string_at(item.data, item.length)) for item in items]

    def output_types(self, inputs: Sequence[int]) -> list[int]:
        """TensorRT's numbers of the outputs' dtypes, given those of the inputs."""
        count = self.library.c.plugin_outputs(self.pointer)
        out = (ctypes.c_int32 * count)()
        given = (ctypes.c_int32 * len(inputs))(*inputs)
        self._check(self.library.c.plugin_output_types(self.pointer, out, count, given, len(inputs)))
        return list(out)

    def output_shapes(self, inputs: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The outputs' shapes, given those of the inputs."""
        count = self.library.c.plugin_outputs(self.pointer)
        out = (Dims * count)()
        given = _array(Dims, [Dims.of(shape) for shape in inputs])
        self._check(self.library.c.plugin_output_shapes(self.pointer, *given, out, count))
        return [dims.shape for dims in out]

    def supports(self, position: int, io: Io) -> bool:
        """Whether the tensor at this place among inputs and outputs has a format and dtype that it takes."""
        tensors, _ = _array(DynamicTensorDesc, [*io.inputs, *io.outputs])
        counts = len(io.inputs), len(io.outputs)
        return bool(self.library.c.plugin_supports(self.pointer, position, tensors, *counts))

    def configure(self, io: Io) -> None:
        """Once for each optimization profile."""
        self._check(self.library.c.plugin_configure(self.pointer, *io.arguments()))

    def workspace(self, io: Io) -> int:
        """Bytes of workspace that an execution within these bounds needs."""
        return self.library.c.plugin_workspace(self.pointer, *io.arguments())

    def shape_change(self, io: Io) -> None:
        """The shapes of the executions that follow: the upper bounds of `io`."""
        inputs, outputs = io.at_most()
        arguments = _array(TensorDesc, inputs) + _array(TensorDesc, outputs)
        self._check(self.library.c.plugin_shape_change(self.pointer, *arguments))

    def enqueue(
        self, io: Io, inputs: Sequence[int], outputs: Sequence[int], workspace: int | None, stream: int | None = None
    ) -> None:
        """inputs, outputs, workspace: addresses on the device. stream: a CUstream."""
        given, made = io.at_most()
        descs = _array(TensorDesc, given)[0], _array(TensorDesc, made)[0]
        pointers = (ctypes.c_void_p * len(inputs))(*inputs), (ctypes.c_void_p * len(outputs))(*outputs)
        arguments = (*descs, *pointers, ctypes.c_void_p(workspace), ctypes.c_void_p(stream))
        self._check(self.library.c.plugin_enqueue(self.pointer, *arguments))
