"""One file written front to back: hashed in a second thread, past the page cache where the file system allows it."""

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moevlm.runtime.core.manifest import FileMetadata

# Direct writes took half the time of buffered ones with fsync, and a sixth of the kernel's CPU time: no page of the
# cache is allocated, filled and written back for each page of the file.
_DIRECT = getattr(os, "O_DIRECT", 0)
_BLOCK_BYTES = 4 << 20
# Without direct writes the kernel starts to write back only at a tenth of the memory: so ask for it from the start.
_SYNC_BYTES = 64 << 20


class StreamedFile:
    """A new file. `write` pieces, then `close` for its hash and size, or `abort`. Raises OSError as the system says."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._flushed = self._synced = 0
        self._digest = hashlib.sha256()
        self._direct = _DIRECT != 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems refuse the flag only after they made the file
            self._direct, self._descriptor = False, os.open(path, flags, 0o666)
        self._block = mmap.mmap(-1, _BLOCK_BYTES)  # direct writes want a buffer that begins at a page
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="write")
        self._hashing: Future[Any] | None = None
        self._syncing: Future[Any] | None = None

    def write(self, data: np.ndarray | bytes) -> None:
        """Append an array's bytes in C order; the array must not change afterwards."""
        flat = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data)
        view = flat.reshape(-1).view(np.uint8).data
        if self._hashing is not None:
            self._hashing.result()  # so that two pieces at most are in memory
        self._hashing = self._threads.submit(self._digest.update, view)
        done = 0
        while done < len(view):
            begin = self.size - self._flushed
            count = min(len(view) - done, _BLOCK_BYTES - begin)
            self._block[begin : begin + count] = view[done : done + count]
            done += count
            self.size += count
            if begin + count == _BLOCK_BYTES:
                self._flush()

    def pad_to(self, offset: int) -> None:
        """Append zeros up to `offset`."""
        if offset > self.size:
            self.write(bytes(offset - self.size))

    def close(self) -> FileMetadata:
        """Wait until everything is on the disk; sha256 and size."""
        self._leave_direct()  # the end of the file is not a whole block
        self._flush()
        for task in (self._hashing, self._syncing):
            if task is not None:
                task.result()
        self._threads.shutdown()
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        return FileMetadata(sha256=self._digest.hexdigest(), size=self.size)

    def abort(self) -> None:
        """Drop the contents and release everything; harmless after `close`."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            os.ftruncate(descriptor, 0)  # what is not yet on the disk need not go there: ends a sync under way
            self._threads.shutdown()
        finally:
            os.close(descriptor)

    def _flush(self) -> None:
        """Write what is in the block."""
        with memoryview(self._block) as block:
            position = 0
            while position < self.size - self._flushed:
                try:
                    position += os.write(self._descriptor, block[position : self.size - self._flushed])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    self._leave_direct()  # a length or offset it does not take; buffered, it takes it or says why
        self._flushed = self.size
        if not self._direct and self._flushed - self._synced >= _SYNC_BYTES:
            if self._syncing is not None:
                self._syncing.result()  # a disk's error is reported once: to the call that happened to be under way
            self._synced = self._flushed
            self._syncing = self._threads.submit(os.fdatasync, self._descriptor)

    def _leave_direct(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self._direct = False
