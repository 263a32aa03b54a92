"""The sha256 of a checkpoint's files: computed once, beside other work, and compared with hashes known beforehand."""

import hashlib
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from moevlm.export.checkpoint.files import find, read_text
from moevlm.runtime.core.errors import CheckpointError
from moevlm.runtime.core.manifest import FileMetadata

_PIECE_BYTES = 4 << 20
_SUMS = "SHA256SUMS"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUMS_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


class Fingerprint:
    """sha256 and size of some files of one directory. The work runs in a thread: hashlib releases the GIL."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.directory = directory
        self.names = tuple(names)
        self._metadata: dict[str, FileMetadata] = {}
        self._failure: Exception | None = None
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless it has begun already."""
        if self._thread is None:
            # A daemon: an interrupted command must not wait at exit until gigabytes are hashed.
            self._thread = threading.Thread(target=self._run, name="checkpoint-hash", daemon=True)
            self._thread.start()

    def result(self) -> Mapping[str, FileMetadata]:
        """Wait for the hashes, by file name. Raises CheckpointError when a file cannot be read."""
        self.start()
        assert self._thread is not None
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        if self._cancelled.is_set():
            raise CheckpointError(f"hashing {self.directory} was stopped")
        return MappingProxyType(self._metadata)

    def cancel(self) -> None:
        """Stop hashing soon; `result` raises from then on if it was not complete."""
        if self._thread is not None and self._thread.is_alive():
            self._cancelled.set()
            self._thread.join()

    def _run(self) -> None:
        try:
            for name in self.names:
                metadata = file_facts(self.directory / name, self._cancelled)
                if metadata is None:
                    return
                self._metadata[name] = metadata
        except Exception as error:  # handed to the thread that asks for the result
            self._failure = error


def file_facts(path: Path, cancelled: threading.Event | None = None) -> FileMetadata | None:
    """sha256 and size of one file, in constant memory; None once `cancelled` is set. Raises CheckpointError."""
    digest, size, piece = hashlib.sha256(), 0, bytearray(_PIECE_BYTES)
    view = memoryview(piece)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(piece):
                if cancelled is not None and cancelled.is_set():
                    return None
                digest.update(view[:count])
                size += count
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return FileMetadata(sha256=digest.hexdigest(), size=size)


def known_hashes(directory: Path, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """name -> (sha256, where that is recorded), for those of `names` whose hash is known beforehand.

    Read are a `SHA256SUMS` file in the directory, and what Hugging Face's downloader leaves for files in LFS: a
    snapshot's link to blobs/<sha256>, or the second line of .cache/huggingface/download/<name>.metadata. (For small
    files both hold a git blob id instead, 40 digits, which says nothing about the sha256.)
    """
    known: dict[str, tuple[str, str]] = {}
    for name in names:
        path = directory / name
        target = path.resolve()
        record = f".cache/huggingface/download/{name}.metadata"
        if path.is_symlink() and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
            known[name] = target.name, "the name of its blob in the Hugging Face cache"
        elif find(directory, record):
            lines = read_text(directory, record).splitlines()
            if len(lines) >= 2 and _SHA256.fullmatch(lines[1].strip()):
                known[name] = lines[1].strip(), record
    sums = _read_sums(directory)
    return known | {name: (sums[name], _SUMS) for name in names if name in sums}


def _read_sums(directory: Path) -> dict[str, str]:
    if find(directory, _SUMS) is None:
        return {}
    sums = {}
    for number, line in enumerate(read_text(directory, _SUMS).splitlines(), start=1):
        if not line.strip():
            continue
        match = _SUMS_LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(f"{directory / _SUMS} line {number} is not '<sha256>  <file>': {line[:100]!r}")
        sums[match[2].removeprefix("./")] = match[1].lower()
    return sums


def require_known_hashes(fingerprint: Fingerprint) -> tuple[str, ...]:
    """Compare with every hash that is known beforehand; returns the names that were compared.

    Raises CheckpointError on the first mismatch, with both hashes.
    """
    known = known_hashes(fingerprint.directory, fingerprint.names)
    if not known:
        return ()
    metadata = fingerprint.result()
    for name, (expected, where) in known.items():
        if metadata[name].sha256 != expected:
            raise CheckpointError(
                f"{fingerprint.directory / name} is damaged or was changed: its sha256 is {metadata[name].sha256}, "
                f"expected {expected} ({where})"
            )
    return tuple(known)
