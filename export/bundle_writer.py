"""Writes a bundle so that it is there whole or not at all: a hidden directory beside it, fsync, one rename."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, Self

import msgspec
import onnx_ir as ir

from moevlm.export.atomic_directory import AtomicDirectory
from moevlm.export.model_file import Progress, data_bytes, graph_bytes, plan, write_data
from moevlm.export.streamed_file import StreamedFile
from moevlm.runtime.bundle import MANIFEST, Bundle, is_bundle_path
from moevlm.runtime.errors import BuildError
from moevlm.runtime.manifest import FileFacts, Manifest, digest_of

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

    def __enter__(self) -> Self:
        self._refuse_foreign_destination()
        try:
            self._directory = AtomicDirectory(self.destination.resolve())
        except OSError as error:
            raise BuildError(f"cannot write {self.destination}: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.discard()

    def add_bytes(self, path: str, data: bytes) -> None:
        """Add a small file. path: relative to the bundle."""
        self._add(path, len(data), lambda file: file.write(data))

    def add_model(self, model: ir.Model, path: str, progress: Progress | None = None) -> None:
        """Add an ONNX graph at `path`, and its large initializers in one file, `path`.data, streamed.

        progress: called with (bytes written, bytes in total) of the data file after every slice.
        The model itself is left as it is. Raises BuildError, or what reading the weights raises.
        """
        spans = plan(model)
        if spans:
            needed = data_bytes(spans)
            self._add(f"{path}.data", needed, lambda file: write_data(spans, file, progress))
        graph = graph_bytes(model, spans, f"{Path(path).name}.data")
        self.add_bytes(path, graph)

    def add_structure(self, model: ir.Model, path: str) -> None:
        """Add an ONNX graph without its large initializers: it refers to the data file that `add_model` would write."""
        self.add_bytes(path, graph_bytes(model, plan(model), f"{Path(path).name}.data"))

    def keep(self, bundle: Bundle, paths: Iterable[str] | None = None) -> None:
        """Take over files of an existing bundle as they are, without rereading them: hard links where possible.

        paths: which ones; by default all that have not been added to this bundle. Their recorded hashes are taken
        over too, so damage that is in them is still found.
        """
        kept = bundle.manifest.files
        for path in [path for path in kept if path not in self._files] if paths is None else paths:
            source, target = bundle.path(path).resolve(), self._claim(path)
            try:
                _link(source, target)
            except OSError as error:
                self._refuse(target, kept[path].size, error)
            self._files[path] = kept[path]

    def commit(self, manifest: Manifest) -> Path:
        """Put the finished bundle into place, with `manifest` and the hashes of all files in it; returns its path.

        files and digest of `manifest` are ignored. Raises BuildError if an engine names a graph that was not added.
        """
        for name, engine in manifest.engines.items():
            for path in (engine.vision, engine.decoder):
                if path not in self._files:
                    raise BuildError(f"engine {name} names {path}, which was not written")
        manifest = msgspec.structs.replace(manifest, files=dict(sorted(self._files.items())))
        manifest = msgspec.structs.replace(manifest, digest=digest_of(msgspec.json.encode(manifest)))
        data = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
        self._write(self._directory.path / MANIFEST, len(data), lambda file: file.write(data))
        try:
            self._directory.commit()
        except OSError as error:
            self._refuse(self._directory.path, 0, error)
        return self.destination

    def _add(self, path: str, needed: int, fill: Callable[[StreamedFile], None]) -> None:
        self._files[path] = self._write(self._claim(path), needed, fill)

    def _claim(self, path: str) -> Path:
        """The place of a new file in the hidden directory, its folder made."""
        if not is_bundle_path(path) or path in self._files:
            raise BuildError(f"cannot add {path!r} to {self.destination}: not a new path inside the bundle")
        target = self._directory.path / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._refuse(target, 0, error)
        return target

    def _write(self, target: Path, needed: int, fill: Callable[[StreamedFile], None]) -> FileFacts:
        file = None
        try:
            if shutil.disk_usage(self._directory.path).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file = StreamedFile(target)
            fill(file)
            return file.close()
        except OSError as error:
            self._refuse(target, needed, error)
        finally:
            if file is not None:
                file.abort()

    def _refuse(self, target: Path, needed: int, error: OSError) -> NoReturn:
        """The error in one line, in terms of the destination."""
        name = self.destination / target.relative_to(self._directory.path)
        if error.errno not in _DISK_FULL:
            raise BuildError(f"cannot write {name}: {error.strerror}") from error
        free = shutil.disk_usage(self._directory.path).free
        raise BuildError(f"cannot write {name}: the disk is full ({needed} bytes needed, {free} free)") from error

    def _refuse_foreign_destination(self) -> None:
        """A bundle may be replaced, even a damaged one; anything else at the destination is someone's work."""
        if not (self.destination.exists() or self.destination.is_symlink()):
            return
        try:
            manifest = msgspec.json.decode((self.destination / MANIFEST).read_bytes())
        except (OSError, ValueError):
            manifest = None
        if not isinstance(manifest, dict) or not {"schema", "files", "engines"} <= manifest.keys():
            raise BuildError(f"{self.destination} exists and is not a bundle: choose another place, or remove it")


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        shutil.copyfile(source, target)  # another file system, or one without hard links
