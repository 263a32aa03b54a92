"""A directory that appears whole or not at all: filled under a hidden name beside its place, then renamed."""

import ctypes
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_STALE_SECONDS = 60


class AtomicDirectory:
    """Fill `path`, then `commit` it to `destination`, whose parent must exist; call `discard` in any case.

    Methods raise OSError as the system reports it.
    """

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        _remove_stale(destination)
        self.path = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.new")
        self._lock = -1
        try:
            self.path.mkdir()
            # Held while this process lives: how another one tells a killed writer's leavings from work in progress.
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with suppress(OSError):  # some network file systems have no locks; the age then has to do
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path = self.path.rename(self.path.with_suffix(".partial"))
        except BaseException:
            _remove(self.path)
            raise

    def commit(self, replaces: bool) -> None:
        """Put everything on the disk and into place; what was at `destination` is removed by `discard`.

        replaces: whether something may be there. Raises FileExistsError if not so, and there is.
        """
        for directory, _, _ in os.walk(self.path):
            _sync_directory(Path(directory))
        if os.path.lexists(self.destination):
            if not replaces:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.destination))
            _exchange(self.path, self.destination)
        else:
            self.path.rename(self.destination)
        _sync_directory(self.destination.parent)

    def discard(self) -> None:
        """Remove whatever lies under the hidden name: unfinished work, or after `commit` what has been replaced."""
        _remove(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories. On Linux in one step; elsewhere, for a moment, there is nothing at `old`."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        rename = None
    if rename is not None and rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    aside = new.with_suffix(".previous")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(directory: Path) -> None:
    for _ in range(3):  # a second Ctrl-C while cleaning up must not leave the half of it
        with suppress(KeyboardInterrupt, SystemExit):
            shutil.rmtree(directory, ignore_errors=True)
            break


def _remove_stale(destination: Path) -> None:
    """Remove what writers to the same destination left that were killed outright."""
    name = re.compile(rf"\.{re.escape(destination.name)}\.[0-9a-f]{{8}}\.(partial|new)")
    for path in destination.parent.glob(f".{glob.escape(destination.name)}.*"):
        if name.fullmatch(path.name):
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if _is_dead(path, descriptor):
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(descriptor)


def _is_dead(path: Path, descriptor: int) -> bool:
    """Tell whether its writer is dead. A new one is locked at once, a partial one from the beginning."""
    old = time.time() - os.fstat(descriptor).st_mtime > _STALE_SECONDS
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return old  # a file system without locks
    return old or path.suffix == ".partial"
