"""An ONNX graph with its weights mapped from open files, so that ONNX Runtime has no path to open by itself.

Of the graph only its initializers are read here: a protocol buffer is a list of (field, value), values being numbers or
bytes, which are messages in their turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from moevlm.runtime.bundle.verified_file import BundleFile, MappedFile
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import EngineError, one_line, shown

# Fields of onnx.proto, which never change.
_GRAPH = 7  # of ModelProto
_INITIALIZER = 5  # of GraphProto
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_EXTERNAL = 1  # TensorProto.DataLocation
_NAMES = ("float32", "uint8", "int8", "int32", "int64", "float16", "float64")
_DTYPES = {DTYPES[name].onnx: DTYPES[name].numpy for name in _NAMES}
_MAX_DIMS = 8

Value = int | memoryview


@dataclass(frozen=True)
class GraphFile:
    """path: for messages, and the folder that external data is relative to. data: the graph's bytes.

    weights: arrays of all initializers that lie outside of the graph, by name, read-only, in the memory of `maps`.
    """

    path: Path
    data: bytes
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    maps: tuple[MappedFile, ...] = ()

    @classmethod
    def of(cls, directory: Path, name: str, data: bytes, files: Mapping[str, BundleFile]) -> GraphFile:
        """The graph `name` of the bundle at `directory`, and the data files that it names, all out of `files`.

        files: by path inside the bundle; they may be closed afterwards. Raises EngineError for a graph that is damaged,
        or weights that lie elsewhere.
        """
        path, folder = directory / name, PurePosixPath(name).parent
        maps: dict[str, MappedFile] = {}
        weights = {}
        try:
            for tensor in _external(data):
                place = (folder / tensor.location).as_posix()
                if place not in files:
                    raise EngineError(
                        f"{path}: {one_line(tensor.name, 80)} lies in {shown(tensor.location)}, "
                        "which is no file of its engine"
                    )
                if place not in maps:
                    maps[place] = files[place].map()
                weights[tensor.name] = tensor.array(maps[place])
        except ValueError as error:
            raise EngineError(f"{path} is no ONNX graph: {one_line(error)}") from None
        return cls(path, data, weights, tuple(maps.values()))

    def require_whole(self) -> None:
        """Raise EngineError if a data file was cut short since it was mapped."""
        for mapped in self.maps:
            mapped.require_whole()


@dataclass(frozen=True)
class _Tensor:
    """An initializer outside of the graph: `length` bytes at `offset` of the file `location` beside it."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int

    def array(self, mapped: MappedFile) -> np.ndarray:
        size = math.prod(self.shape) * self.dtype.itemsize
        if self.length != size:
            raise ValueError(f"{self.name} has {self.length} bytes, its shape {list(self.shape)} needs {size}")
        if not 0 <= self.offset <= len(mapped.memory) - size:
            raise ValueError(f"{self.name} lies at {self.offset}, outside of {mapped.path.name}")
        return np.frombuffer(mapped.memory, self.dtype, math.prod(self.shape), self.offset).reshape(self.shape)


def _external(model: bytes) -> Iterator[_Tensor]:
    for graph in _messages(memoryview(model), _GRAPH):
        for initializer in _messages(graph, _INITIALIZER):
            fields: dict[int, list[Value]] = {}
            for number, value in _fields(initializer):
                fields.setdefault(number, []).append(value)
            if fields.get(_DATA_LOCATION, [0])[-1] == _EXTERNAL:
                yield _tensor(fields)


def _tensor(fields: Mapping[int, list[Value]]) -> _Tensor:
    name = _text(fields.get(_NAME, [memoryview(b"")])[-1])
    dtype = fields.get(_DATA_TYPE, [0])[-1]
    if dtype not in _DTYPES:
        raise ValueError(f"{name} has data type {dtype} (supported: {', '.join(map(str, _DTYPES))})")
    shape = tuple(size for value in fields.get(_DIMS, []) for size in _numbers(value))
    if len(shape) > _MAX_DIMS or any(size < 0 for size in shape):
        raise ValueError(f"{name} has the shape {list(shape[:_MAX_DIMS])}")
    where = {}
    for entry in fields.get(_EXTERNAL_DATA, []):
        pair = dict(_fields(entry)) if isinstance(entry, memoryview) else {}
        where[_text(pair.get(_KEY, memoryview(b"")))] = _text(pair.get(_VALUE, memoryview(b"")))
    numpy = _DTYPES[dtype]
    length = where.get("length", str(math.prod(shape) * numpy.itemsize))
    return _Tensor(name, numpy, shape, where.get("location", ""), int(where.get("offset", "0")), int(length))


def _messages(message: memoryview, number: int) -> Iterator[memoryview]:
    for field_number, value in _fields(message):
        if field_number == number and isinstance(value, memoryview):
            yield value


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """(number, value) of every field. Raises ValueError."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value - (value >> 63 << 64)  # numbers of 64 bits are signed
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(message)}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError(f"a number of more than ten bytes ends at byte {at}")


def _numbers(value: Value) -> Iterator[int]:
    """A repeated number, which may be packed into one field."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        yield number - (number >> 63 << 64)


def _text(value: Value) -> str:
    if isinstance(value, int):
        raise ValueError("a number in place of a text")  # noqa: TRY004 - of the file, not of the program
    return bytes(value).decode()
