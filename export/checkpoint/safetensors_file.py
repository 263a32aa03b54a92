"""The tensors of one safetensors file as lazy weights.

Data is read with `preadv` into fresh arrays: pages of a memory map would count towards the process's peak memory.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moevlm.export.checkpoint.files import refuse_pointer
from moevlm.runtime.bundle.safetensors import read_entries
from moevlm.runtime.core.errors import CheckpointError

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

# Of columns: a read for each row takes longer than to read whole rows of so few bytes.
_SHORT_ROW = 8 << 10
_PIECE = 1 << 20  # bytes of short rows that are read at once


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
        array = np.empty(shape, self.dtype)
        with self._opened() as read:
            read(array, first * math.prod(self.shape[1:]))
        self._check_finite(array, (first, *(0 for _ in shape[1:])))
        return array

    def columns(self, start: int, stop: int) -> np.ndarray:
        """Columns [start:stop] of a matrix as a fresh array [rows, stop - start]; raises as `rows`."""
        rows, width = self.shape
        start, stop, _ = slice(start, stop).indices(width)
        if stop - start == width:
            return self.rows(0, rows)
        array = np.empty((rows, max(0, stop - start)), self.dtype)
        step = _PIECE // (width * self.dtype.itemsize) if width * self.dtype.itemsize <= _SHORT_ROW else 0
        with self._opened() as read:
            for i in range(0, rows, max(1, step)):
                if step:
                    whole = np.empty((min(step, rows - i), width), self.dtype)
                    read(whole, i * width)
                    array[i : i + step] = whole[:, start:stop]
                else:
                    read(array[i], i * width + start)
        self._check_finite(array, (0, start))
        return array

    @contextmanager
    def _opened(self) -> Iterator[Callable[[np.ndarray, int], None]]:
        """A function that fills a contiguous array with what begins at an item of the tensor."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                status = os.fstat(descriptor)
                if (status.st_size, status.st_mtime_ns) != (self.file_size, self.modified_ns):
                    raise CheckpointError(f"{self.path} changed while it was in use: run the command again")
                yield lambda array, item: self._fill(descriptor, array, self.offset + item * self.dtype.itemsize)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {self.name} of {self.path}: {error.strerror}") from error

    def _fill(self, descriptor: int, array: np.ndarray, offset: int) -> None:
        target, done = array.reshape(-1).view(np.uint8).data, 0
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path} ends inside tensor {self.name}: the file is truncated")
            done += count

    def _check_finite(self, array: np.ndarray, origin: tuple[int, ...]) -> None:
        """origin: where in the tensor the array begins."""
        limit = _FIRST_NON_FINITE.get(self.dtype.name)
        if limit is None or not array.size:
            return
        # Two reductions over the bits, without a temporary array: as signed integers only positive values reach
        # the limit, as unsigned ones only negative values reach the limit with the sign bit.
        bits = array.reshape(-1).view(f"u{self.dtype.itemsize}")
        sign = 1 << (8 * self.dtype.itemsize - 1)
        if bits.view(f"i{self.dtype.itemsize}").max() < limit and bits.max() < limit + sign:
            return
        place = np.unravel_index(int(np.argmax((bits & (sign - 1)) >= limit)), array.shape)
        index = [int(i) + begin for i, begin in zip(place, origin[: array.ndim], strict=True)]
        raise CheckpointError(f"{self.path}: tensor {self.name} is not finite at {index}: the file is damaged")


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name. Raises CheckpointError as `read_entries`, or if it cannot be read."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())

            def read(offset: int, count: int) -> bytes:
                file.seek(offset)
                return file.read(count)

            refuse_pointer(path, read(0, 64))
            entries = read_entries(path, status.st_size, read, CheckpointError)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return {
        name: Stored(path, name, entry.shape, entry.dtype.numpy, entry.begin, status.st_size, status.st_mtime_ns)
        for name, entry in entries.items()
    }
