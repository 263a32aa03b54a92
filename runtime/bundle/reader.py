"""Opens a bundle: a directory of graphs, weights and text files, each named with its hash in manifest.json."""

import os
import re
import stat
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import msgspec

from moevlm.runtime.bundle.file_hashes import check_files, read_checked
from moevlm.runtime.bundle.verified_file import BundleFile
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import BundleError, shown
from moevlm.runtime.core.gpus import sm_of
from moevlm.runtime.core.manifest import SCHEMA, FileMetadata, Manifest, digest_of
from moevlm.runtime.core.manifest_limits import check_metadata
from moevlm.runtime.core.printable import in_shell
from moevlm.runtime.core.progress import Progress

MANIFEST = "manifest.json"
ENGINES = "engines"
MAX_MANIFEST_BYTES = 64 << 20
_KINDS = ("rtx", "trt", "cpu", "ort-cpu", "reference")
_ROUNDED = ("int8", "", "fp8", "fp4", "int4")  # "": weights as they are
_CLUTTER = (".DS_Store", "Thumbs.db", "desktop.ini", ".directory")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Version(msgspec.Struct):
    schema: int


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest has been read and checked. Its files' contents are checked by `verify`."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the manifest, and check every path in it and what lies under engines/.

        Raises BundleError for a missing or malformed manifest, another schema version, a number that no model has, a
        path that leaves the bundle, an engine whose graphs are not listed, or a file under engines/ that is not listed.
        """
        directory = Path(path)
        bundle = cls(directory, _read_manifest(directory))
        bundle._check_manifest()
        check_metadata(bundle.manifest)
        bundle._refuse_strangers()
        return bundle

    def engine(self, target: str) -> tuple[str, EngineMetadata]:
        """The engine that `target` names, in full or up to a colon; of several the first of `preferred`.

        Raises BundleError, listing the engines that there are, if none fits. What this machine has does not matter
        here: see `moevlm.runtime.backends.selection`.
        """
        engines = self.manifest.engines
        name = preferred(engines, self.matches(target))[0]
        return name, engines[name]

    def matches(self, target: str) -> list[str]:
        """The engine of that name, or all whose names begin with it and a colon. Raises BundleError without one.

        Without either, those whose plans are for the GPUs that `target` names: rtx:4090, rtx:sm89 and rtx:4090:bf16
        find rtx:sm86,sm89:bf16.
        """
        engines = self.manifest.engines
        names = [target] if target in engines else sorted(name for name in engines if name.startswith(f"{target}:"))
        names = names or sorted(name for name, metadata in engines.items() if _is_plan_for(name, metadata, target))
        if not names:
            raise BundleError(f"no engine {shown(target)} in {self.directory} (available: {self.available})")
        return names

    @property
    def available(self) -> str:
        """The names of all engines, for errors."""
        return ", ".join(sorted(self.manifest.engines)) or "none"

    def engine_files(self, name: str) -> tuple[str, ...]:
        """Every file of the engine `name`: all that lie in the folders of its graphs, external data included.

        Of a TensorRT engine also the experts' weights, which it may share with others.
        """
        _, engine = self.engine(name)
        named = engine.named_files
        folders = {PurePosixPath(graph).parent for graph in engine.graphs}
        return tuple(
            path for path in self.manifest.files if path in named or not folders.isdisjoint(PurePosixPath(path).parents)
        )

    def open_file(self, name: str) -> BundleFile:
        """A listed file, opened for reading; its contents are not checked here.

        Raises BundleError if it is not listed, missing, no regular file, or behind a link.
        """
        self._metadata([name])
        return BundleFile(self.directory, name)

    def path(self, name: str) -> Path:
        """The path of a listed file. Raises BundleError as `open_file`, which is to be preferred."""
        with self.open_file(name) as file:
            return file.path

    def read_text(self, name: str) -> str:
        """A listed text file, checked against its hash as it is read. Raises BundleError."""
        try:
            return self.read_bytes(name).decode("utf-8")
        except ValueError:
            raise BundleError(f"{self.directory / name} is not UTF-8 text") from None

    def optional_text(self, name: str) -> str | None:
        """As `read_text`; None for a file that is not listed."""
        return self.read_text(name) if name in self.manifest.files else None

    def read_bytes(self, name: str) -> bytes:
        """A listed file: what is returned is what was checked against its hash. Raises BundleError."""
        return read_checked(self.directory, name, self._metadata([name])[name])

    def verify(self, names: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        """Compare files with their hashes in the manifest; by default all. Progress and errors as `check_files`."""
        check_files(self.directory, self._metadata(names), progress)

    def open_verified(self, names: Iterable[str], progress: Progress | None = None) -> dict[str, BundleFile]:
        """Like `verify`, and leaves the files open, for the caller to close: what was checked is what they read."""
        return check_files(self.directory, self._metadata(names), progress, keep=True)

    def _metadata(self, names: Iterable[str] | None) -> dict[str, FileMetadata]:
        files = self.manifest.files
        try:
            return {name: files[name] for name in (files if names is None else names)}
        except KeyError as error:
            raise BundleError(f"{self.directory} has no file {error.args[0]}") from None

    def _check_manifest(self) -> None:
        where = self.directory / MANIFEST
        for name, metadata in self.manifest.files.items():
            if not is_bundle_path(name):
                raise BundleError(f"{where}: files has {shown(name)}, which is not a path inside the bundle")
            if not _SHA256.fullmatch(metadata.sha256) or metadata.size < 0:
                raise BundleError(f"{where}: files has no sha256 and size for {name}")
        for target, engine in self.manifest.engines.items():
            for path in engine.named_files:
                if path not in self.manifest.files:
                    raise BundleError(f"{where}: engines.{target} names {path}, which files does not list")

    def _refuse_strangers(self) -> None:
        """An engine library opens files by itself (external data, kernels): none may be there without a hash."""
        graphs = [graph for engine in self.manifest.engines.values() for graph in engine.graphs]
        folders = {ENGINES, *(PurePosixPath(graph).parent.as_posix() for graph in graphs)}
        for folder in folders:
            for name in unlisted(self.directory, self.manifest.files, "" if folder == "." else folder):
                raise BundleError(f"{self.directory / name} is not listed in {MANIFEST}: remove it")


def unlisted(directory: Path, listed: Container[str], folder: str = "") -> Iterator[str]:
    """Yield each file in `folder` of a bundle that is not listed, by its path inside the bundle.

    The manifest is not among them, nor is what file managers leave in every folder. Raises BundleError for a folder
    that cannot be read.
    """
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(directory / here) as entries:
                for entry in entries:
                    name = f"{here}/{entry.name}" if here else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(name)
                    elif name not in listed and name != MANIFEST and not is_clutter(entry.name):
                        yield name
        except (FileNotFoundError, NotADirectoryError):
            continue  # a listed file that is missing is told when it is opened
        except OSError as error:
            raise BundleError(f"cannot read {directory / here}: {error.strerror}") from error


def is_clutter(name: str) -> bool:
    """Tell whether file managers write files of this name: never opened, and not kept when a bundle is rewritten."""
    return name in _CLUTTER or name.startswith("._")


def preferred(engines: Mapping[str, EngineMetadata], names: Iterable[str]) -> list[str]:
    """`names` in the order in which an engine is taken where several would do.

    Plans for a GPU come first, then the CPU's fast engines, then those for checks. Of one kind int8 comes first, which
    costs next to no accuracy and half the bytes or less; then unrounded weights, fp8 and int4.
    """

    def rank(name: str) -> tuple[int, int, str]:
        kind, dtype = name.partition(":")[0], engines[name].dtype
        return (
            _KINDS.index(kind) if kind in _KINDS else len(_KINDS),
            _ROUNDED.index(dtype) if dtype in _ROUNDED else _ROUNDED.index(""),
            name,
        )

    return sorted(names, key=rank)


def is_bundle_path(name: str) -> bool:
    """Whether `name` is a plain relative path, a/b/c, that a bundle may list (its manifest cannot list itself)."""
    parts = name.split("/")
    return name != MANIFEST and "\0" not in name and "\\" not in name and not {"", ".", ".."} & set(parts)


def _is_plan_for(name: str, metadata: EngineMetadata, target: str) -> bool:
    """Whether `target`, such as rtx:4090,l40s or rtx:4090:bf16, means this engine."""
    kind, _, rest = target.partition(":")
    gpus, _, precision = rest.partition(":")
    if name.partition(":")[0] != kind:
        return False
    return {sm_of(gpu) for gpu in gpus.split(",")} <= set(metadata.sms) and (
        not precision or name.endswith(f":{precision}")
    )


def _is_checkpoint(directory: Path) -> bool:
    return os.path.isfile(directory / "config.json")  # noqa: PTH113 - Path.is_file raises for a name that is too long


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        exists = stat.S_ISDIR(directory.stat().st_mode)
    except OSError as error:
        raise BundleError(f"no bundle at {directory}: {error.strerror}") from None
    if not exists or not os.path.lexists(path):
        build = f"moevlm build {in_shell(directory)} -o BUNDLE"
        hint = f" (a checkpoint becomes one: {build})" if _is_checkpoint(directory) else ""
        why = f"it has no {MANIFEST}" if exists else "it is a file, and a bundle is a folder"
        raise BundleError(f"{directory} is not a bundle: {why}{hint}")
    with BundleFile(directory, MANIFEST) as file:
        if file.size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} has {file.size} bytes (allowed: up to {MAX_MANIFEST_BYTES})")
        data = file.read(MAX_MANIFEST_BYTES)
    try:
        version = msgspec.json.decode(data, type=_Version).schema
        if version > SCHEMA:
            raise BundleError(f"{path}: schema = {version} (supported: {SCHEMA}): a newer moevlm made it")
        if version < SCHEMA:
            raise BundleError(
                f"{path}: schema = {version} (supported: {SCHEMA}): an older moevlm made it; build it again: "
                f"moevlm build CHECKPOINT -o {directory} --force"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: {error}") from None
    if manifest.digest != digest_of(data):
        raise BundleError(f"{path} is damaged or was changed: its fields do not have the digest that it names")
    return manifest
