"""A file of a bundle, opened once: what was hashed is what is read or mapped, whatever becomes of its path."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from moevlm.runtime.core.errors import BundleError, EngineError

_PIECE_BYTES = 1 << 20
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO would block, a link lead elsewhere


class BundleFile:
    """A regular file, open for reading. Use it as a context manager, or call `close`."""

    def __init__(self, directory: Path, name: str) -> None:
        """name: its path inside the bundle, a/b/c.

        Raises BundleError if it is missing, cannot be read, is no regular file, or lies behind a link.
        """
        self.path = directory / name
        self._descriptor = -1
        try:
            self._descriptor = _open(directory, name)
        except OSError as error:
            raise BundleError(_refusal(directory, name, error)) from error
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise BundleError(f"{self.path} is not a regular file")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Maps that were made of it stay. Once more does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    @property
    def size(self) -> int:
        """Its bytes, now."""
        return os.fstat(self._descriptor).st_size

    def read(self, most: int) -> bytes:
        """The first `most` bytes, or all if it has fewer. Raises BundleError if they cannot be read."""
        pieces: list[bytes] = []
        done = 0
        try:
            while piece := os.pread(self._descriptor, min(most - done, _PIECE_BYTES), done):
                pieces.append(piece)
                done += len(piece)
        except OSError as error:
            raise BundleError(f"cannot read {self.path}: {error.strerror}") from error
        return b"".join(pieces)

    def sha256(self, advance: Callable[[int], bool] = lambda _: True) -> str:
        """The hash of all bytes; "" if `advance`, called with the size of each piece, says to stop.

        Raises BundleError if they cannot be read.
        """
        digest, piece, done = hashlib.sha256(), bytearray(_PIECE_BYTES), 0
        view = memoryview(piece)
        try:
            while count := os.preadv(self._descriptor, [piece], done):
                digest.update(view[:count])
                done += count
                if not advance(count):
                    return ""
        except OSError as error:
            raise BundleError(f"cannot read {self.path}: {error.strerror}") from error
        return digest.hexdigest()

    def map(self) -> MappedFile:
        """Its bytes in memory that other processes share. Raises BundleError for an empty file."""
        try:
            memory = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            reason = "it is empty" if not self.size else str(error)
            raise BundleError(f"cannot map {self.path}: {reason}") from error
        return MappedFile(self.path, memory)


@dataclass(frozen=True)
class MappedFile:
    """A file's bytes, read from the disk when they are first touched. Closed with the last reference to `memory`."""

    path: Path
    memory: mmap.mmap

    def forget(self) -> None:
        """Let go of the pages that were touched; whoever touches them again finds them in the system's cache."""
        self.memory.madvise(mmap.MADV_DONTNEED)

    def require_whole(self) -> None:
        """Raise EngineError if the file was cut short since: touching what is gone would end the process."""
        if (size := self.memory.size()) < len(self.memory):
            raise EngineError(
                f"{self.path} was cut short while it was in use: it has {size} of {len(self.memory)} bytes; "
                "restore the bundle and load it again"
            )


def _open(directory: Path, name: str) -> int:
    """A descriptor. Every folder on the way is opened by itself, so that none is a link. Raises OSError."""
    *folders, last = name.split("/")
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            child = os.open(folder, _FLAGS | os.O_DIRECTORY, dir_fd=parent)
            os.close(parent)
            parent = child
        return os.open(last, _FLAGS, dir_fd=parent)
    finally:
        os.close(parent)


def _refusal(directory: Path, name: str, error: OSError) -> str:
    place = directory
    for part in name.split("/"):
        place = place / part
        if place.is_symlink():
            return f"{place} is a link (a bundle has plain files: a link may lead outside the bundle)"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"{place} is missing"
    return f"cannot read {place}: {error.strerror}"
