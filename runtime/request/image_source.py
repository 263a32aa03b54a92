"""Reads images from files, bytes, streams, Pillow images and arrays. Text never names a file."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import Protocol

import numpy as np
from PIL import Image

from moevlm.runtime.core.errors import RequestError, one_line, shown


class Readable(Protocol):
    """A binary file or stream, read from where it stands."""

    def read(self, size: int, /) -> bytes: ...


Buffer = bytes | bytearray | memoryview
ImageSource = Image.Image | Buffer | os.PathLike[str] | Readable | np.ndarray

_ALLOWED = (
    "a pathlib.Path, encoded bytes, a binary file, a Pillow image, or an array [height, width, 3] of uint8; "
    "URLs are not fetched"
)
_URL = re.compile(r"(https?|ftp|file|data):", re.IGNORECASE)


def read_source(source: ImageSource, most: int) -> tuple[Image.Image | bytes, str]:
    """An image that was decoded elsewhere, or an encoded one, and what to call it in messages.

    most: bytes of an encoded image. Raises RequestError for more, for a file that cannot be read, and for anything
    that is no image.
    """
    if isinstance(source, Image.Image):
        return source, "image"
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise RequestError(
                f"an image is an array {list(source.shape)} of {source.dtype} (allowed: [height, width, 3] of uint8)"
            )
        return Image.fromarray(source), "image"
    if isinstance(source, bytes | bytearray | memoryview):
        return _limited(source if isinstance(source, bytes) else bytes(source), most, "image"), "image"
    if isinstance(source, os.PathLike):
        path = os.fsdecode(source)
        name = f"image {_path_name(path)}"
        return _limited(_read_file(path, most, name), most, name), name
    if hasattr(source, "read"):
        return _limited(_read_stream(source, most), most, "image"), "image"
    kind = "the text " if isinstance(source, str) else ""
    raise RequestError(f"an image is {kind}{shown(source)} (allowed: {_ALLOWED})")


def _read_file(path: str, most: int, name: str) -> bytes:
    """The content of a regular file: opening waits for nobody, as that of a pipe would."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise RequestError(f"{name} is not a file")
            if found.st_size > most:
                raise _too_large(name, most)
            return file.read(most + 1) or b""  # None of a file in /proc that has nothing yet
    except (OSError, ValueError) as error:  # ValueError: a null character
        if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError) or _URL.match(path):
            raise RequestError(f"{name} {_absent(path)}") from error
        if error.errno in (errno.EISDIR, errno.ENXIO):  # ENXIO: a socket
            raise RequestError(f"{name} is not a file") from error
        raise RequestError(f"{name} cannot be read: {error.strerror}") from error


def _absent(path: str) -> str:
    scheme = _URL.match(path)
    if scheme is None:
        return "does not exist"
    if scheme[1].lower() == "data":
        return "is a data URI, not a file (allowed in a message: a part of type image_url)"
    return "is not a file: URLs are not fetched"


def _read_stream(stream: Readable, most: int) -> bytes:
    try:
        content = stream.read(most + 1)
    except Exception as error:  # a stream of the caller's own may fail in any way
        raise RequestError(f"an image's stream cannot be read: {one_line(error)}") from error
    if not isinstance(content, bytes):
        raise RequestError(f"an image's stream gives {type(content).__name__} (allowed: bytes, of a file opened as rb)")
    return content


def _limited(content: bytes, most: int, name: str) -> bytes:
    if len(content) > most:
        raise _too_large(name, most)
    return content


def _too_large(name: str, most: int) -> RequestError:
    return RequestError(f"{name} has more than {most} bytes (the most that is allowed)")


def _path_name(path: str) -> str:
    return repr(path) if len(path) <= 200 else repr(path[:60]) + "..."
