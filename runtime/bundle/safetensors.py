"""The safetensors format: headers checked in full before any tensor is used, files as mapped bytes, headers to write.

A file is 8 bytes (header length N, little-endian), N bytes of JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moevlm.runtime.bundle.verified_file import MappedFile
from moevlm.runtime.core.dtypes import SAFETENSORS, DType
from moevlm.runtime.core.errors import BundleError, MoevlmError, one_line, shown

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's reference implementation
MAX_RANK = 16


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it. begin, end: its bytes, counted from the beginning of the file."""

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Tensor:
    """A tensor in memory. data: its bytes in the mapped file, uint8."""

    dtype: DType
    shape: tuple[int, ...]
    data: np.ndarray


def read_entries(
    path: Path, size: int, read: Callable[[int, int], bytes], error: type[MoevlmError] = BundleError
) -> dict[str, Entry]:
    """Every tensor of a file by its name, metadata left out.

    path: for messages. size: bytes of the file. read: (offset, count) -> bytes of the file.
    Raises `error`, naming file and tensor, unless the header is whole and the tensors' bytes fill the rest of the file
    exactly, in some order, with neither gap nor overlap.
    """
    header = _Header(path, error)
    length = int.from_bytes(read(0, 8), "little")
    if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise header.refused(f"its header length is {length}, the file has {size} bytes")
    data = 8 + length
    entries = {
        name: header.entry(name, fields, data)
        for name, fields in header.parsed(read(8, length)).items()
        if name != "__metadata__"
    }
    header.check_spans(entries, data, size)
    return entries


def open_tensors(file: MappedFile) -> dict[str, Tensor]:
    """Every tensor of a mapped file by its name; bytes are read from disk when they are first touched.

    Raises BundleError as `read_entries`.
    """
    data = np.frombuffer(file.memory, np.uint8)
    entries = read_entries(file.path, len(data), lambda offset, count: data[offset : offset + count].tobytes())
    return {name: Tensor(entry.dtype, entry.shape, data[entry.begin : entry.end]) for name, entry in entries.items()}


def header_of(tensors: Mapping[str, tuple[DType, tuple[int, ...]]], alignment: int) -> bytes:
    """The beginning of a file that has these tensors in this order, padded to a multiple of `alignment` bytes."""
    fields, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.bytes
        fields[name] = {"dtype": dtype.safetensors, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(fields, separators=(",", ":")).encode()
    size = -(-(8 + len(text)) // alignment) * alignment - 8
    return size.to_bytes(8, "little") + text.ljust(size)


@dataclass(frozen=True)
class _Header:
    """The checks of one file's header. path, error: for messages."""

    path: Path
    error: type[MoevlmError]

    def refused(self, reason: str) -> MoevlmError:
        return self.error(f"{self.path} is not a whole safetensors file: {reason}")

    def parsed(self, text: bytes) -> dict[str, Any]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            fields: dict[str, Any] = {}
            for name, value in pairs:
                if name in fields:
                    raise ValueError(f"duplicate name {one_line(name, 80)}")
                fields[name] = value
            return fields

        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise self.refused(f"its header is not valid JSON ({error})") from None
        if not isinstance(header, dict):
            raise self.refused("its header is not a JSON object")
        return header

    def entry(self, name: str, fields: Any, data: int) -> Entry:
        """One entry, checked. data: where the tensors' bytes begin."""
        told = one_line(name, 80)
        if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise self.refused(f"tensor {told} needs exactly the fields dtype, shape, data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in SAFETENSORS:
            supported = ", ".join(sorted(SAFETENSORS))
            raise self.error(f"{self.path}: tensor {told} has dtype {shown(dtype)} (supported: {supported})")
        if not _is_sizes(shape):
            raise self.refused(f"tensor {told} has shape {shown(shape)}")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise self.refused(f"tensor {told} has data_offsets {shown(offsets)}")
        needed = math.prod(shape) * SAFETENSORS[dtype].bytes
        if offsets[1] - offsets[0] != needed:
            raise self.refused(f"tensor {told}, {dtype} {shape}, needs {needed} bytes, its data_offsets are {offsets}")
        return Entry(SAFETENSORS[dtype], tuple(shape), data + offsets[0], data + offsets[1])

    def check_spans(self, entries: Mapping[str, Entry], data: int, size: int) -> None:
        """The tensors lie side by side from `data` to the file's end, at `size`."""
        position = data
        for begin, end, name in sorted((entry.begin, entry.end, name) for name, entry in entries.items()):
            if begin != position:
                raise self.refused(
                    f"tensor {one_line(name, 80)} begins at data byte {begin - data}, the one before it ends at "
                    f"{position - data}"
                )
            position = end
        if position != size:
            what = "the file is truncated" if size < position else "there are bytes that belong to no tensor"
            raise self.refused(f"its tensors need {position - data} data bytes, it has {size - data}: {what}")


def _is_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MAX_RANK:
        return False
    return all(type(item) is int and 0 <= item < 1 << 63 for item in value)
