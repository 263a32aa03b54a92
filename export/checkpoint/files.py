"""Opens a checkpoint's small files: regular ones, of a sane size, that are the checkpoint's own."""

import os
import stat
from pathlib import Path
from typing import Any

from moevlm.runtime.core.errors import CheckpointError
from moevlm.runtime.core.json_object import json_object

MAX_BYTES = 16 << 20
# The largest that are published: tokenizer.json 33 MB (Gemma 3), tekken.json 20 MB, indices 15 MB (Kimi K2, a name for
# each expert).
_LARGER = {"tokenizer.json": 256 << 20, "tekken.json": 64 << 20, "model.safetensors.index.json": 64 << 20}

_POINTER = b"version https://git-lfs.github.com/spec/"


def find(directory: Path, name: str) -> Path | None:
    """The path of a file of the checkpoint, whatever its size; None if nothing of that name is there.

    Raises CheckpointError if it is not a regular file, or a link to a place that is not the checkpoint's: who clones
    a checkpoint must not get a file of their own into the bundle. A link may point inside the checkpoint, or from a
    snapshot of the Hugging Face cache to that cache's blobs.
    """
    path = directory / name
    if not os.path.lexists(path):
        return None
    try:
        root, real = directory.resolve(strict=True), path.resolve(strict=True)
        kind = real.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except RuntimeError:  # Python 3.11's word for a link that leads to itself
        raise CheckpointError(f"cannot read {path}: the link leads to itself") from None
    if not (real.is_relative_to(root) or real.parent in _blobs(root)):
        raise CheckpointError(
            f"{path} is a link to {real} (allowed: a place inside the checkpoint, or from a snapshot of the "
            "Hugging Face cache to its blobs)"
        )
    if not stat.S_ISREG(kind):
        raise CheckpointError(f"{path} is not a regular file")
    return path


def read_bytes(directory: Path, name: str) -> bytes:
    """A whole small file. Raises CheckpointError if it is missing, too large for its kind, or as `find`."""
    path = find(directory, name)
    if path is None:
        raise CheckpointError(f"{directory} has no {name}")
    limit = _LARGER.get(name, MAX_BYTES)
    try:
        # NONBLOCK: a pipe that took the file's place meanwhile must not hang the build.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} has more than {limit >> 20} MB (the most that is allowed for it)")
    refuse_pointer(path, data)
    return data


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raises CheckpointError for what a clone without Git LFS has in a file's place. beginning: of the file."""
    if beginning.startswith(_POINTER):
        raise CheckpointError(f"{path} is not the file but Git LFS's pointer to it (git lfs pull fetches it)")


def read_text(directory: Path, name: str) -> str:
    """A small file of UTF-8 text. Raises CheckpointError as `read_bytes`, or if it is anything else."""
    try:
        return read_bytes(directory, name).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{directory / name} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A small file that is a JSON object. Raises CheckpointError as `read_bytes` and `json_object`."""
    return json_object(read_bytes(directory, name), str(directory / name), CheckpointError)


def optional_json(directory: Path, name: str) -> dict[str, Any]:
    """`read_json`, but an empty object if there is no such file."""
    return read_json(directory, name) if find(directory, name) else {}


def _blobs(root: Path) -> list[Path]:
    """Folders of blobs that a snapshot may link to: models--organization--name/snapshots/revision, or inside it."""
    return [folder.parent / "blobs" for folder in root.parents if folder.name == "snapshots"]
