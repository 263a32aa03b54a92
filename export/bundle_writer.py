"""Writes a bundle so that it is there whole or not at all: a hidden directory beside it, fsync, one rename."""

import errno
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Self

import msgspec
import onnx_ir as ir

from moevlm.export.atomic_directory import AtomicDirectory
from moevlm.export.model_file import Progress, data_bytes, graph_bytes, plan, write_data
from moevlm.export.streamed_file import StreamedFile
from moevlm.runtime.bundle import MANIFEST, Bundle, is_safe_path
from moevlm.runtime.errors import BuildError, BundleError
from moevlm.runtime.manifest import FileFacts, Manifest

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class BundleWriter:
    """A bundle under construction; use it as a context manager.

    Until `commit` returns, the destination is untouched; without a commit, and on any exception, KeyboardInterrupt
    included, nothing is left behind. An existing bundle at the destination is replaced; anything else there is
    refused with BuildError, and so is every failure of the file system, in one line.
    """

    def __init__(self, destination: str | Path) -> None:
        self.destination = Path(destination)
        self._files: dict[str, FileFacts] = {}
        self._open: StreamedFile | None = None

    def __enter__(self) -> Self:
        self._refuse_foreign_destination()
        try:
            self._directory = AtomicDirectory(self.destination.resolve())
        except OSError as error:
            raise BuildError(f"cannot write {self.destination}: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            with suppress(OSError):
                self._open.abort()
        self._directory.discard()

    def add_bytes(self, path: str, data: bytes) -> None:
        """Add a small file. path: relative to the bundle."""
        self._write(path, len(data), lambda file: file.write(data))

    def add_model(self, model: ir.Model, path: str, progress: Progress | None = None) -> None:
        """Add an ONNX graph at `path`, and its large initializers in one file, `path`.data, streamed.

        progress: called with (bytes written, bytes in total) of the data file after every slice.
        The model itself is left as it is. Raises BuildError, or what reading the weights raises.
        """
        spans = plan(model)
        if spans:
            needed = data_bytes(spans)
            self._write(f"{path}.data", needed, lambda file: write_data(spans, file, progress))
        graph = graph_bytes(model, spans, f"{Path(path).name}.data")
        self.add_bytes(path, graph)

    def keep(self, bundle: Bundle, paths: Iterable[str] | None = None) -> None:
        """Take over files of an existing bundle as they are, without rereading them: hard links where possible.

        paths: which ones; by default all that have not been added to this bundle. Their recorded hashes are taken
        over too, so damage that is in them is still found.
        """
        chosen = bundle.manifest.files if paths is None else paths
        for path in chosen:
            if paths is None and path in self._files:
                continue
            target = self._claim(path)
            source = bundle.path(path).resolve()
            try:
                self._link(source, target)
            except OSError as error:
                self._refuse(path, bundle.manifest.files[path].size, error)
            self._files[path] = bundle.manifest.files[path]

    def commit(self, manifest: Manifest) -> Path:
        """Put the finished bundle into place, with `manifest` and the hashes of all files in it; returns its path.

        manifest.files is ignored. Raises BuildError if an engine names a graph that has not been added.
        """
        for name, engine in manifest.engines.items():
            for path in (engine.vision, engine.decoder):
                if path not in self._files:
                    raise BuildError(f"engine {name} names {path}, which was not written")
        manifest = msgspec.structs.replace(manifest, files=dict(sorted(self._files.items())))
        data = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
        self._write(MANIFEST, len(data), lambda file: file.write(data))
        try:
            self._directory.commit()
        except OSError as error:
            self._refuse("", 0, error)
        return self.destination

    def _write(self, path: str, needed: int, fill) -> None:
        target = self._claim(path)
        try:
            free = shutil.disk_usage(target.parent).free
            if free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._open = StreamedFile(target)
            fill(self._open)
            self._files[path] = self._open.close()
            self._open = None
        except OSError as error:
            self._refuse(path, needed, error)

    def _claim(self, path: str) -> Path:
        """The place of a new file in the hidden directory, its folder made."""
        if not is_safe_path(path) or path in self._files or (path == MANIFEST and self._files.get(path)):
            raise BuildError(f"cannot add {path!r} to {self.destination}: not a new path inside the bundle")
        target = self._directory.path / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._refuse(path, 0, error)
        return target

    @staticmethod
    def _link(source: Path, target: Path) -> None:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            shutil.copyfile(source, target)  # another file system, or one without hard links

    def _refuse(self, path: str, needed: int, error: OSError) -> NoReturn:
        if error.errno not in _DISK_FULL:
            raise BuildError(f"cannot write {self.destination / path}: {error.strerror}") from error
        written = self._open.size if self._open is not None else 0
        free = shutil.disk_usage(self._directory.path).free
        raise BuildError(
            f"cannot write {self.destination / path}: the disk is full "
            f"({needed} bytes needed, {written} written, {free} free)"
        ) from error

    def _refuse_foreign_destination(self) -> None:
        if not os.path.lexists(self.destination):
            return
        try:
            Bundle.open(self.destination)
        except BundleError:
            pass
