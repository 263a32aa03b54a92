"""Compares files of a bundle with the sizes and hashes that its manifest has for them."""

import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from moevlm.runtime.bundle.verified_file import BundleFile
from moevlm.runtime.core.errors import BundleError
from moevlm.runtime.core.manifest import FileMetadata
from moevlm.runtime.core.progress import Progress


def check_files(
    directory: Path, metadata: Mapping[str, FileMetadata], progress: Progress | None = None, *, keep: bool = False
) -> dict[str, BundleFile]:
    """Hash the files of `metadata`, two at a time. keep: return them open, for the caller to close; else nothing.

    progress: called with (bytes read, bytes in total), from the threads that read, one call at a time.
    Raises BundleError, naming the first file found that is missing or differs.
    """
    names = sorted(metadata, key=lambda name: -metadata[name].size)
    for name in names:  # sizes first: they cost nothing
        with BundleFile(directory, name) as file:
            _require_size(file, metadata[name])
    total, done = sum(metadata[name].size for name in names), 0
    opened: dict[str, BundleFile] = {}
    lock, stop = threading.Lock(), threading.Event()

    def advance(count: int) -> bool:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)
        return not stop.is_set()

    def check(name: str) -> None:
        file = BundleFile(directory, name)
        try:
            _require_size(file, metadata[name])
            if found := file.sha256(advance):
                _require_hash(file, found, metadata[name])
            if keep:
                opened[name] = file
        finally:
            if name not in opened:
                file.close()

    try:
        with ThreadPoolExecutor(2, thread_name_prefix="verify") as threads:
            tasks = [threads.submit(check, name) for name in names]
            try:
                for task in as_completed(tasks):
                    task.result()
            except BaseException:
                stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    except BaseException:
        for file in opened.values():
            file.close()
        raise
    return opened


def read_checked(directory: Path, name: str, metadata: FileMetadata) -> bytes:
    """A whole file: what is returned is what was hashed. Raises BundleError if it is missing or differs."""
    with BundleFile(directory, name) as file:
        _require_size(file, metadata)
        data = file.read(metadata.size)
        _require_hash(file, hashlib.sha256(data).hexdigest(), metadata)
    return data


def _require_size(file: BundleFile, metadata: FileMetadata) -> None:
    if file.size != metadata.size:
        raise BundleError(f"{file.path} is damaged: it has {file.size} bytes, manifest.json says {metadata.size}")


def _require_hash(file: BundleFile, sha256: str, metadata: FileMetadata) -> None:
    if sha256 != metadata.sha256:
        raise BundleError(
            f"{file.path} is damaged or was changed: its sha256 is {sha256}, manifest.json says {metadata.sha256}"
        )
