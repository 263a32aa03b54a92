"""Kernels that TensorRT-RTX compiled for this GPU, kept on disk from one process to the next."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

_HASH_BYTES = 32


def cache_file(*key: object) -> Path | None:
    """Where the kernels of `key` lie: in the user's cache folder. None if it is not the user's alone to write.

    What lies there runs on the GPU, so a folder that others may write to is not used.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.expanduser raises
    folder = Path(home) / "moevlm" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        return None
    return folder / (hashlib.sha256(repr(key).encode()).hexdigest()[:40] + ".bin")


class KernelCache:
    """TensorRT-RTX's runtime cache, shared by all contexts of an engine. With path None nothing is kept.

    loaded: whether kernels of an earlier process were taken over.
    """

    def __init__(self, path: Path | None) -> None:
        self.loaded = False
        self._path = path
        self._cache: Any = None
        self._stored = b""

    def attach(self, config: Any) -> None:
        """Let contexts that are made with `config`, an IRuntimeConfig, use it. A CUDA context must be current."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            stored = self._read()
            # TensorRT refuses what another version, driver or GPU has written; it is written anew then.
            if stored and self._cache.deserialize(stored):
                self.loaded, self._stored = True, stored
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what is new. A disk that cannot be written to costs the next start its time, and nothing else."""
        if self._cache is None or self._path is None:
            return
        serialized = self._cache.serialize()
        data = b"" if serialized is None else bytes(serialized)
        if not data or data == self._stored:
            return
        try:
            handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".part")
        except OSError:
            return
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            part.replace(self._path)
            self._stored = data
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()

    def close(self) -> None:
        self.save()
        self._cache = None

    def _read(self) -> bytes:
        """The bytes that were saved, if they are whole."""
        try:
            data = self._path.read_bytes() if self._path is not None else b""
        except OSError:
            return b""
        digest, stored = data[:_HASH_BYTES], data[_HASH_BYTES:]
        return stored if hashlib.sha256(stored).digest() == digest else b""
