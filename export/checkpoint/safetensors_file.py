"""One safetensors file: its header, checked in full before any tensor is used, and its tensors as lazy weights.

A file is 8 bytes (header length N, little-endian), N bytes of JSON, then the tensors' bytes. Data is read with
`preadv` into fresh arrays: pages of a memory map would count towards the process's peak memory.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from moevlm.runtime.core.dtypes import SAFETENSORS
from moevlm.runtime.core.errors import CheckpointError, one_line, shown

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's reference implementation
MAX_RANK = 16

# Bits of +infinity (of +NaN for float8_e4m3fn, which has no infinity): this and everything above it, sign aside,
# is not a finite number.
_FIRST_NON_FINITE = {
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7C,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: `shape`, numpy `dtype`, and where its bytes begin. Nothing is held open.

    file_size, modified_ns: the file's when its header was read; another file in its place is noticed.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    file_size: int
    modified_ns: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start:stop] of the first axis as a fresh array (a 0-d tensor is returned whole).

        Raises CheckpointError when the file cannot be read, has changed since its header was read, or holds a
        NaN or an infinity there: trained weights have none, so it is damage.
        """
        shape, first = self.shape, 0
        if self.shape:
            first, stop, _ = slice(start, stop).indices(self.shape[0])
            shape = (max(0, stop - first), *self.shape[1:])
        row_items = math.prod(self.shape[1:])
        array = np.empty(shape, self.dtype)
        self._read_into(array, self.offset + first * row_items * self.dtype.itemsize)
        self._check_finite(array, first * row_items)
        return array

    def _read_into(self, array: np.ndarray, offset: int) -> None:
        target = array.reshape(-1).view(np.uint8).data
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                status = os.fstat(descriptor)
                if (status.st_size, status.st_mtime_ns) != (self.file_size, self.modified_ns):
                    raise CheckpointError(f"{self.path} changed while it was in use: run the command again")
                done = 0
                while done < len(target):
                    count = os.preadv(descriptor, [target[done:]], offset + done)
                    if count == 0:
                        raise CheckpointError(f"{self.path} ends inside tensor {self.name}: the file is truncated")
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {self.name} of {self.path}: {error.strerror}") from error

    def _check_finite(self, array: np.ndarray, first_item: int) -> None:
        limit = _FIRST_NON_FINITE.get(self.dtype.name)
        if limit is None or not array.size:
            return
        # Two reductions over the bits, without a temporary array: as signed integers only positive values reach
        # the limit, as unsigned ones only negative values reach the limit with the sign bit.
        bits = array.reshape(-1).view(f"u{self.dtype.itemsize}")
        sign = 1 << (8 * self.dtype.itemsize - 1)
        if bits.view(f"i{self.dtype.itemsize}").max() < limit and bits.max() < limit + sign:
            return
        item = first_item + int(np.argmax((bits & (sign - 1)) >= limit))
        index = [int(i) for i in np.unravel_index(item, self.shape)]
        raise CheckpointError(f"{self.path}: tensor {self.name} is not finite at {index}: the file is damaged")


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name.

    Raises CheckpointError, naming file and tensor, unless the header is whole and the tensors' bytes fill the rest
    of the file exactly, in some order, with neither gap nor overlap.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if status.st_size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, status.st_size - 8):
                _refuse(path, f"its header length is {length}, the file has {status.st_size} bytes")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    header = _parse(path, text)
    data_start, data_bytes = 8 + length, status.st_size - 8 - length
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = _entry(path, name, entry)
        spans.append((begin, end, name))
        tensors[name] = Stored(
            path, name, shape, dtype, data_start + begin, file_size=status.st_size, modified_ns=status.st_mtime_ns
        )
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            _refuse(
                path, f"tensor {one_line(name, 80)} begins at data byte {begin}, the one before it ends at {position}"
            )
        position = end
    if position != data_bytes:
        what = "the file is truncated" if data_bytes < position else "there are bytes that belong to no tensor"
        _refuse(path, f"its tensors need {position} data bytes, it has {data_bytes}: {what}")
    return tensors


def _parse(path: Path, text: bytes) -> dict[str, Any]:
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
        _refuse(path, f"its header is not valid JSON ({error})")
    if not isinstance(header, dict):
        _refuse(path, "its header is not a JSON object")
    return header


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """One header entry, checked: (dtype, shape, (begin, end) in the data section)."""
    told = one_line(name, 80)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {told} needs exactly the fields dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS:
        raise CheckpointError(
            f"{path}: tensor {told} has dtype {shown(dtype)} (supported: {', '.join(sorted(SAFETENSORS))})"
        )
    if not _is_sizes(shape):
        _refuse(path, f"tensor {told} has shape {shown(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        _refuse(path, f"tensor {told} has data_offsets {shown(offsets)}")
    needed = math.prod(shape) * SAFETENSORS[dtype].bytes
    if offsets[1] - offsets[0] != needed:
        _refuse(path, f"tensor {told}, {dtype} {shape}, needs {needed} bytes, its data_offsets are {offsets}")
    return SAFETENSORS[dtype].numpy, tuple(shape), (offsets[0], offsets[1])


def _is_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MAX_RANK:
        return False
    return all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path} is not a whole safetensors file: {reason}")
