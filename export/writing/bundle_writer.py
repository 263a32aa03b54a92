"""Writes a bundle so that it is there whole or not at all: a hidden directory beside it, fsync, one rename."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, Protocol, Self, TypeVar

import msgspec
import onnx_ir as ir

from moevlm.export.writing.atomic_directory import AtomicDirectory
from moevlm.export.writing.destination import require_replaceable
from moevlm.export.writing.model_file import data_bytes, graph_bytes, plan, write_data
from moevlm.export.writing.streamed_file import StreamedFile
from moevlm.runtime.bundle.reader import MANIFEST, Bundle, is_bundle_path, unlisted
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.manifest import FileMetadata, Manifest, digest_of
from moevlm.runtime.core.progress import Progress

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SCRATCH = ".scratch"


class _Built(Protocol):
    """What was built, and the metadata of its file."""

    @property
    def file(self) -> FileMetadata: ...


Made = TypeVar("Made", bound=_Built)


class BundleWriter:
    """A bundle under construction; use it as a context manager.

    Until `commit` returns, the destination is untouched; without a commit, and on any exception, KeyboardInterrupt
    included, nothing is left behind. A bundle at the destination is replaced; anything else there, or a file in it
    that is not the bundle's, is refused with BuildError, and so is every failure of the file system, in one line.
    """

    def __init__(self, destination: str | Path, changes: Bundle | None = None) -> None:
        """changes: the bundle at the destination, if the new one is that one changed.

        Files in it that are not the bundle's then stay, and a commit is refused if it is not the same any more.
        """
        self.destination = Path(destination)
        self._changes = changes
        self._files: dict[str, FileMetadata] = {}

    def __enter__(self) -> Self:
        self._replaces = os.path.lexists(self.destination)
        if self._changes is None:
            require_replaceable(self.destination)
        try:
            self._directory = AtomicDirectory(self.destination.resolve())
        except OSError as error:
            raise BuildError(f"cannot write {self.destination}: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.discard()

    def add_bytes(self, path: str, data: bytes) -> None:
        """Add a small file. path: relative to the bundle."""
        self.add_stream(path, len(data), lambda file: file.write(data))

    def add_model(self, model: ir.Model, path: str, progress: Progress | None = None) -> None:
        """Add an ONNX graph at `path`, and its large initializers in one file, `path`.data, streamed.

        progress: called with (bytes written, bytes in total) of the data file after every slice.
        The model itself is left as it is. Raises BuildError, or what reading the weights raises.
        """
        spans = plan(model)
        if spans:
            needed = data_bytes(spans)
            self.add_stream(f"{path}.data", needed, lambda file: write_data(spans, file, progress))
        graph = graph_bytes(model, spans, f"{Path(path).name}.data")
        self.add_bytes(path, graph)

    def add_stream(self, path: str, needed: int, fill: Callable[[StreamedFile], None]) -> None:
        """Add a file of `needed` bytes, which `fill` writes. Raises BuildError, or what `fill` raises but OSError."""
        self._files[path] = self._write(self._claim(path), needed, fill)

    def add_built(self, path: str, build: Callable[[Path, Path], Made]) -> Made:
        """Add a file that `build` writes to the first path it is given; the second is a folder for what it needs."""
        target, scratch = self._claim(path), self._directory.path / _SCRATCH
        try:
            scratch.mkdir()
            made = build(target, scratch)
        except OSError as error:
            self._refuse(target, 0, error)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._files[path] = made.file
        return made

    def __contains__(self, path: str) -> bool:
        return path in self._files

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

        files and digest of `manifest` are ignored. Raises BuildError if an engine names a file that was not added.
        """
        for name, engine in manifest.engines.items():
            for path in engine.named_files:
                if path not in self._files:
                    raise BuildError(f"engine {name} names {path}, which was not written")
        manifest = msgspec.structs.replace(manifest, files=dict(sorted(self._files.items())))
        manifest = msgspec.structs.replace(manifest, digest=digest_of(msgspec.json.encode(manifest)))
        data = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
        self._write(self._directory.path / MANIFEST, len(data), lambda file: file.write(data))
        if self._changes is not None:
            self._keep_others(self._changes)
        elif self._replaces:
            require_replaceable(self.destination)  # once more: building took its time
        try:
            self._directory.commit(self._replaces)
        except FileExistsError as error:
            raise BuildError(f"{self.destination} was made by somebody else meanwhile: choose another place") from error
        except OSError as error:
            self._refuse(self._directory.path, 0, error)
        return self.destination

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

    def _write(self, target: Path, needed: int, fill: Callable[[StreamedFile], None]) -> FileMetadata:
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
        wanted = f"{needed} bytes needed, " if needed else ""
        raise BuildError(f"cannot write {name}: the disk is full ({wanted}{free} free)") from error

    def _keep_others(self, bundle: Bundle) -> None:
        """Take over what lies in the bundle and is not its own. Raises BuildError if it is not what it was."""
        now = Bundle.open(bundle.directory)
        if now.manifest.digest != bundle.manifest.digest:
            raise BuildError(f"{self.destination} was changed by another process meanwhile: nothing was written")
        for name in unlisted(bundle.directory, bundle.manifest.files):
            try:
                _link(bundle.directory / name, self._claim(name))
            except OSError as error:
                self._refuse(self._directory.path / name, 0, error)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _DISK_FULL or not (source.is_symlink() or source.is_file()):
            raise
        shutil.copy2(source, target, follow_symlinks=False)  # another file system, or one without hard links
