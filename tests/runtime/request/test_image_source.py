"""Where images come from: whatever is none of these is told in one line."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevlm.runtime.core.errors import RequestError
from tests.runtime.request.test_images import PNG, SMALL, processor


def stored(folder: Path) -> Path:
    path = folder / "photo.png"
    path.write_bytes(PNG)
    return path


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": stored,
    "another kind of path": lambda folder: next(os.scandir(stored(folder).parent)),
    "bytes": lambda _: PNG,
    "bytearray": lambda _: bytearray(PNG),
    "memoryview": lambda _: memoryview(PNG),
    "memoryview of every other byte": lambda _: memoryview(bytes(b for byte in PNG for b in (byte, 0)))[::2],
    "BytesIO": lambda _: io.BytesIO(PNG),
    "file": lambda folder: stored(folder).open("rb"),
    "Pillow": lambda _: SMALL,
    "array": lambda _: np.asarray(SMALL),
    "array turned round": lambda _: np.asarray(SMALL)[::-1][::-1],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_is_the_same_image(kind: str, tmp_path: Path) -> None:
    np.testing.assert_array_equal(processor().open(SOURCES[kind](tmp_path)), SMALL)


def test_a_stream_is_read_from_where_it_stands() -> None:
    stream = io.BytesIO(b"before" + PNG)
    stream.seek(6)
    np.testing.assert_array_equal(processor().open(stream), SMALL)


class Broken:
    def read(self, _: int) -> bytes:
        raise OSError(5, "a cable\nwas pulled")


NO_IMAGES: dict[str, tuple[Any, str]] = {
    "text stream": (io.StringIO("text"), "stream gives str (allowed: bytes, of a file opened as rb)"),
    "broken stream": (Broken(), "stream cannot be read: "),
    "closed stream": (closed := io.BytesIO(), "stream cannot be read: "),
    "array of floats": (np.zeros((4, 5, 3)), "is an array [4, 5, 3] of float64 (allowed: [height, width, 3] of uint8)"),
    "array without channels": (np.zeros((4, 5), np.uint8), "is an array [4, 5] of uint8"),
    "array of nothing": (np.zeros((0, 5, 3), np.uint8), "has no pixels"),
    "list": ([[1, 2], [3, 4]], "is [[1, 2], [3, 4]] (allowed: a pathlib.Path, "),
    "nothing": (None, "is null (allowed: "),
    "long text": ("x" * 10**6, "is the text 'xxx"),
    "data URI as text": ("data:image/png;base64," + "A" * 10**6, "is the text 'data:image/png"),
    "data URI as a path": (Path("data:image/png;base64," + "A" * 10**6), "is a data URI, not a file"),
    "URL as a path": (Path("http://x/a.png"), "'http:/x/a.png' is not a file: URLs are not fetched"),
    "path too long": (Path("x" * 300), "xxx'... cannot be read: File name too long"),
    "path of a null character": (Path("a\0b"), "does not exist"),
    "path through a file": (Path(__file__) / "a.png", "does not exist"),
    "folder": (Path(__file__).parent, "is not a file"),
    "device": (Path("/dev/null"), "is not a file"),
}
closed.close()


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_image_is_told_in_one_short_line(kind: str) -> None:
    source, words = NO_IMAGES[kind]
    for act in (processor().open, processor().layout):
        with pytest.raises(RequestError) as caught:
            act(source)
        assert words in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 400


def test_a_file_without_permission_and_a_socket_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name)
        with pytest.raises(RequestError, match=r"is not a file$"):
            processor().open(Path(name))
    path = stored(tmp_path)

    def refused(*_: Any) -> int:  # a privileged user may open everything
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(RequestError, match=r"photo\.png' cannot be read: Permission denied$"):
        processor().open(path)


def test_a_small_image_made_of_an_array_keeps_the_array() -> None:
    array = np.asarray(SMALL).copy()
    processor().open(array).putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(array, np.asarray(SMALL))
    assert isinstance(processor().open(array), Image.Image)
