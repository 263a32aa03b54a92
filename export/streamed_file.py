"""One file written front to back: hashed in a second thread, pushed to the disk from the start in a third."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from moevlm.runtime.manifest import FileFacts

# The kernel starts to write dirty pages back only at a tenth of the memory: without this the disk is idle while a
# model is converted, and fsync then waits for all of it.
SYNC_BYTES = 64 << 20


class StreamedFile:
    """A new file. `write` pieces, then `close` for the facts, or `abort`. Raises OSError as the system reports it."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._synced = 0
        self._digest = hashlib.sha256()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="write")
        self._hashing: Future[Any] | None = None
        self._syncing: Future[Any] | None = None

    def write(self, data: np.ndarray | bytes) -> None:
        """Append an array's bytes in C order; the array must not change afterwards."""
        flat = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data)
        view = memoryview(flat.reshape(-1).view(np.uint8))
        if self._hashing is not None:
            self._hashing.result()  # so that two pieces at most are in memory
        self._hashing = self._threads.submit(self._digest.update, view)
        done = 0
        while done < len(view):
            done += os.write(self._descriptor, view[done:])
        self.size += done
        if self.size - self._synced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()  # a disk's error is reported once: to the call that happened to be under way
            self._synced = self.size
            self._syncing = self._threads.submit(os.fdatasync, self._descriptor)

    def pad_to(self, offset: int) -> None:
        """Append zeros up to `offset`."""
        if offset > self.size:
            self.write(bytes(offset - self.size))

    def close(self) -> FileFacts:
        """Wait until everything is on the disk; sha256 and size."""
        for task in (self._hashing, self._syncing):
            if task is not None:
                task.result()
        self._threads.shutdown()
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        return FileFacts(sha256=self._digest.hexdigest(), size=self.size)

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
