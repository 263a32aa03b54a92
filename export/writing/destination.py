"""Checks of the place where a bundle is written: never over, or into, somebody else's files."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from moevlm.runtime.bundle.reader import MANIFEST, MAX_MANIFEST_BYTES, unlisted
from moevlm.runtime.bundle.verified_file import BundleFile
from moevlm.runtime.core.errors import BuildError, BundleError
from moevlm.runtime.core.printable import in_shell

_SHOWN = 3


def require_new(destination: Path, checkpoint: Path, replace: bool) -> None:
    """Refuse a destination where a bundle would overwrite something, or end up inside another bundle or the checkpoint.

    replace: whether a bundle that is there may be replaced. Raises BuildError.
    """
    if os.path.lexists(destination):
        require_replaceable(destination)
        if not replace:
            adding = f"moevlm build {in_shell(destination)} --checkpoint {in_shell(checkpoint)} --target ..."
            raise BuildError(
                f"{destination} is a bundle already: {adding} adds an engine to it, --force replaces it with all its "
                "engines"
            )
    # Path.resolve raises for a link that leads to itself; what is wrong with it is told when it is opened.
    real, source = (Path(os.path.realpath(path)) for path in (destination, checkpoint))
    if real.is_relative_to(source):
        raise BuildError(f"{destination} lies inside the checkpoint {checkpoint}: choose another place")
    for parent in real.parents:
        if _files_of(parent) is not None:
            raise BuildError(f"{destination} lies inside the bundle {parent}: choose another place")


def require_replaceable(destination: Path) -> None:
    """A bundle may be replaced, even a damaged one, if all that is in it is its own. Raises BuildError."""
    if not os.path.lexists(destination):
        return
    files = _files_of(destination)
    if files is None:
        raise BuildError(f"{destination} exists and is not a bundle: choose another place, or remove it")
    try:
        others = list(islice(unlisted(destination, files), _SHOWN + 1))
    except BundleError as error:
        raise BuildError(str(error)) from error
    if others:
        more = " and more" if len(others) > _SHOWN else ""
        raise BuildError(
            f"{destination} holds files that are not the bundle's ({', '.join(others[:_SHOWN])}{more}), "
            "and replacing it would delete them: move them away, or choose another place"
        )


def _files_of(directory: Path) -> dict[str, Any] | None:
    """The files that the manifest of a bundle lists, whatever its schema; None if there is no bundle."""
    try:
        with BundleFile(directory, MANIFEST) as file:
            manifest = msgspec.json.decode(file.read(MAX_MANIFEST_BYTES))
    except (BundleError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not {"schema", "files", "engines"} <= manifest.keys():
        return None
    return manifest["files"] if isinstance(manifest["files"], dict) else {}


@contextmanager
def locked(bundle: Path, progress: Callable[[str, int, int], None]) -> Iterator[None]:
    """Hold a bundle, if there is one, against every other process that changes it; the kernel lets go with ours.

    progress: told of it if another process holds it. A file system without locks holds nobody back: there a commit
    still finds that the manifest has changed.
    """
    descriptor = _lock(bundle, lambda: progress(f"waiting for another process that changes {bundle}", 0, 0))
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(bundle: Path, waiting: Callable[[], object]) -> int | None:
    while True:
        try:
            descriptor = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None  # nothing there, or nothing that can be a bundle: whoever opens it says why
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), bundle.stat()):
                    return descriptor  # else the directory that was waited for has been replaced by a new one
        except OSError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
