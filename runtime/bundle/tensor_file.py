"""A safetensors file as memory-mapped bytes: 8 bytes for the header's length, a JSON header, then the tensors."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moevlm.runtime.bundle.verified_file import MappedFile
from moevlm.runtime.core.dtypes import SAFETENSORS
from moevlm.runtime.core.errors import BundleError

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """data: its bytes in the mapped file, uint8. dtype: as the file names it."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


def open_tensors(file: MappedFile) -> dict[str, Tensor]:
    """Every tensor of the file by its name; bytes are read from disk when they are first touched.

    Raises BundleError if a tensor has a dtype that is not known, lies outside the file, over another or not at its
    size, or if the header is not what the format asks for.
    """
    path, data = file.path, np.frombuffer(file.memory, np.uint8)
    length = int.from_bytes(data[:8].tobytes(), "little")
    begin = 8 + length
    if len(data) < 8 or length > MAX_HEADER_BYTES or begin > len(data):
        raise BundleError(f"{path}: its header of {length} bytes does not fit into the file or is too long")
    try:
        header = json.loads(data[8:begin].tobytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise BundleError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, (start, end) = _checked(path, name, entry, len(data) - begin)
        tensors[name] = Tensor(dtype, shape, data[begin + start : begin + end])
        spans.append((start, end, name))
    spans.sort()
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise BundleError(f"{path}: {name} and {other} overlap")
    return tensors


def _checked(path: Path, name: str, entry: Any, size: int) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and offsets of an entry that says what the format asks for."""
    fields = entry if isinstance(entry, dict) else {}
    dtype: Any
    shape: Any
    offsets: Any
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in SAFETENSORS:
        raise BundleError(f"{path}: {name} has dtype {dtype!r} (supported: {', '.join(SAFETENSORS)})")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise BundleError(f"{path}: {name} has no shape or no data_offsets")
    start, end = offsets
    if not start <= end <= size:
        raise BundleError(f"{path}: {name} lies at {start} to {end}, outside the file's {size} bytes of data")
    wanted = math.prod(shape) * SAFETENSORS[dtype].bytes
    if end - start != wanted:
        raise BundleError(f"{path}: {name} has {end - start} bytes, its shape {shape} of {dtype} needs {wanted}")
    return dtype, tuple(shape), (start, end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
