"""Opens a bundle: a directory of graphs, weights and text files, each named with its hash in manifest.json."""

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import msgspec

from moevlm.runtime.errors import BundleError
from moevlm.runtime.manifest import SCHEMA, EngineFacts, Manifest, digest_of

MANIFEST = "manifest.json"
ENGINES = "engines"
_PIECE_BYTES = 8 << 20
_KINDS = ("rtx", "trt", "cpu", "ort-cpu", "reference")
_ROUNDED = ("int8", "", "fp8", "int4")  # "": weights as they are
_SHA256 = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[int, int], None]  # (bytes done, bytes in total)


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

        Raises BundleError for a missing or malformed manifest, another schema version, a path that leaves the
        bundle, an engine whose graphs are not listed, or a file under engines/ that is not listed.
        """
        directory = Path(path)
        bundle = cls(directory, _read_manifest(directory))
        bundle._check_manifest()
        bundle._refuse_strangers()
        return bundle

    def engine(self, target: str) -> tuple[str, EngineFacts]:
        """The engine that `target` names, in full or up to a colon; of several the first of `preferred`.

        Raises BundleError, listing the engines that there are, if none fits. What this machine has does not matter
        here: see `moevlm.runtime.selection`.
        """
        engines = self.manifest.engines
        name = preferred(engines, self.matches(target))[0]
        return name, engines[name]

    def matches(self, target: str) -> list[str]:
        """The engine of that name, or all whose names begin with it and a colon. Raises BundleError without one."""
        engines = self.manifest.engines
        names = [target] if target in engines else sorted(name for name in engines if name.startswith(f"{target}:"))
        if not names:
            raise BundleError(f"no engine {target!r} in {self.directory} (available: {self.available})")
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
        named = named_files(engine)
        folders = {PurePosixPath(graph).parent for graph in (engine.vision, engine.decoder)}
        return tuple(
            path for path in self.manifest.files if path in named or not folders.isdisjoint(PurePosixPath(path).parents)
        )

    def path(self, name: str) -> Path:
        """Where a listed file lies. Raises BundleError if it is not listed, missing, or a link out of the bundle.

        Its contents are not checked here: see `verify`.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.directory} has no file {name}")
        path = self.directory / name
        if not path.is_file():
            raise BundleError(f"{path} is missing")
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise BundleError(f"{path} is a link to a place outside the bundle")
        return path

    def read_text(self, name: str) -> str:
        """A listed text file, checked against its hash as it is read. Raises BundleError."""
        try:
            return self.read_bytes(name).decode("utf-8")
        except ValueError:
            raise BundleError(f"{self.path(name)} is not UTF-8 text") from None

    def read_bytes(self, name: str) -> bytes:
        """A listed file, checked against its hash as it is read: what is returned is what was checked.

        Raises BundleError.
        """
        path = self.path(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}") from error
        self._require_hash(name, len(data), hashlib.sha256(data).hexdigest())
        return data

    def verify(self, paths: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        """Compare files with their hashes in the manifest, two at a time; by default all files.

        progress: called with (bytes read, bytes in total), from the threads that read, one call at a time.
        Raises BundleError, naming the first file found that is missing or differs.
        """
        facts = self.manifest.files
        names = sorted(facts if paths is None else paths, key=lambda name: -facts[name].size if name in facts else 0)
        for name in names:  # sizes first: they cost nothing
            size = self.path(name).stat().st_size
            if size != facts[name].size:
                raise BundleError(
                    f"{self.directory / name} is damaged: it has {size} bytes, {MANIFEST} says {facts[name].size}"
                )
        total, done = sum(facts[name].size for name in names), 0
        lock, stop = threading.Lock(), threading.Event()

        def advance(count: int) -> bool:
            nonlocal done
            with lock:
                done += count
                if progress is not None:
                    progress(done, total)
            return not stop.is_set()

        with ThreadPoolExecutor(2, thread_name_prefix="verify") as threads:
            tasks = [threads.submit(self._verify_one, name, advance) for name in names]
            try:
                for task in as_completed(tasks):
                    task.result()
            finally:
                stop.set()
                threads.shutdown(wait=False, cancel_futures=True)

    def _verify_one(self, name: str, advance: Callable[[int], bool]) -> None:
        digest, size, piece = hashlib.sha256(), 0, bytearray(_PIECE_BYTES)
        view = memoryview(piece)
        try:
            with (self.directory / name).open("rb", buffering=0) as file:
                while count := file.readinto(piece):
                    digest.update(view[:count])
                    size += count
                    if not advance(count):
                        return
        except OSError as error:
            raise BundleError(f"cannot read {self.directory / name}: {error.strerror}") from error
        self._require_hash(name, size, digest.hexdigest())

    def _require_hash(self, name: str, size: int, sha256: str) -> None:
        expected = self.manifest.files[name]
        if (size, sha256) != (expected.size, expected.sha256):
            raise BundleError(
                f"{self.directory / name} is damaged or was changed: "
                f"its sha256 is {sha256}, {MANIFEST} says {expected.sha256}"
            )

    def _check_manifest(self) -> None:
        where = self.directory / MANIFEST
        for name, facts in self.manifest.files.items():
            if not is_bundle_path(name):
                raise BundleError(f"{where}: files has {name!r}, which is not a path inside the bundle")
            if not _SHA256.fullmatch(facts.sha256) or facts.size < 0:
                raise BundleError(f"{where}: files has no sha256 and size for {name}")
        for target, engine in self.manifest.engines.items():
            for path in named_files(engine):
                if path not in self.manifest.files:
                    raise BundleError(f"{where}: engines.{target} names {path}, which files does not list")

    def _refuse_strangers(self) -> None:
        """An engine library opens files by itself (external data, kernels): none may be there without a hash."""
        graphs = [graph for engine in self.manifest.engines.values() for graph in (engine.vision, engine.decoder)]
        for folder in {ENGINES, *(PurePosixPath(graph).parent.as_posix() for graph in graphs)}:
            for path in (self.directory / folder).rglob("*"):
                name = path.relative_to(self.directory).as_posix()
                if (path.is_symlink() or not path.is_dir()) and name not in {*self.manifest.files, MANIFEST}:
                    raise BundleError(f"{path} is not listed in {MANIFEST}: remove it")


def named_files(engine: EngineFacts) -> tuple[str, ...]:
    """The files that an engine's facts name, as paths inside the bundle."""
    experts = engine.tensorrt.experts if engine.tensorrt is not None else ""
    return (engine.vision, engine.decoder, *((experts,) if experts else ()))


def preferred(engines: Mapping[str, EngineFacts], names: Iterable[str]) -> list[str]:
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


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not directory.exists():
            raise BundleError(f"no bundle at {directory}") from None
        raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST}") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    try:
        version = msgspec.json.decode(data, type=_Version).schema
        if version != SCHEMA:
            raise BundleError(f"{path}: schema = {version} (supported: {SCHEMA}); export the bundle again")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: {error}") from None
    if manifest.digest != digest_of(data):
        raise BundleError(f"{path} is damaged or was changed: its fields do not have the digest that it names")
    return manifest
