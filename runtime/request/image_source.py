"""Reads images from files, bytes, streams, Pillow images and arrays. Text never names a file."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import BinaryIO, Protocol

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
        name = f"image {path_name(path)}"
        return _limited(_read_file(path, most, name), most, name), name
    if hasattr(source, "read"):
        return read_stream(source, most, "image"), "image"
    kind = "the text " if isinstance(source, str) else ""
    raise RequestError(f"an image is {kind}{shown(source)} (allowed: {_ALLOWED})")


def open_regular(path: str, most: int, name: str) -> BinaryIO:
    """A regular file, open: opening waits for nobody, as that of a pipe would. RequestError as `read_source`."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise _unreadable(path, name, error) from error
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size <= most:
        return file
    file.close()
    raise _too_large(name, most) if stat.S_ISREG(found.st_mode) else RequestError(f"{name} is not a file")


def _read_file(path: str, most: int, name: str) -> bytes:
    """The content of a regular file."""
    with open_regular(path, most, name) as file:
        try:
            return file.read(most + 1) or b""  # None of a file in /proc that has nothing yet
        except OSError as error:
            raise _unreadable(path, name, error) from error


def _unreadable(path: str, name: str, error: OSError | ValueError) -> RequestError:
    if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError) or _URL.match(path):
        return RequestError(f"{name} {_absent(path)}")
    if error.errno in (errno.EISDIR, errno.ENXIO):  # ENXIO: a socket
        return RequestError(f"{name} is not a file")
    return RequestError(f"{name} cannot be read: {error.strerror}")


def _absent(path: str) -> str:
    scheme = _URL.match(path)
    if scheme is None:
        return "does not exist"
    if scheme[1].lower() == "data":
        return "is a data URI, not a file (allowed in a message: a part of type image_url)"
    return "is not a file: URLs are not fetched"


def read_stream(stream: Readable, most: int, what: str) -> bytes:
    """The bytes of a binary stream, at most `most`. what: in messages. Raises RequestError."""
    try:
        content = stream.read(most + 1)
    except Exception as error:  # a stream of the caller's own may fail in any way
        raise RequestError(f"{_article(what)}'s stream cannot be read: {one_line(error)}") from error
    if not isinstance(content, bytes):
        kind = type(content).__name__
        raise RequestError(f"{_article(what)}'s stream gives {kind} (allowed: bytes, of a file opened as rb)")
    return _limited(content, most, what)


def _article(what: str) -> str:
    return f"an {what}" if what == "image" else f"a {what}"


def _limited(content: bytes, most: int, name: str) -> bytes:
    if len(content) > most:
        raise _too_large(name, most)
    return content


def _too_large(name: str, most: int) -> RequestError:
    return RequestError(f"{name} has more than {most} bytes (the most that is allowed)")


def path_name(path: str) -> str:
    """A path for a message: quoted, and not too long."""
    return repr(path) if len(path) <= 200 else repr(path[:60]) + "..."
