"""Files of a bundle that are not what they should be: refused by name, without hanging, without reading for ever."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from moevlm.runtime.backends.tensorrt.kernel_resources import kernels_of
from moevlm.runtime.bundle.reader import MAX_MANIFEST_BYTES, Bundle
from moevlm.runtime.bundle.verified_file import BundleFile
from moevlm.runtime.core.errors import BundleError
from tests.support.bundles import copy_bundle, edit_manifest, rehash
from tests.support.command_line import assert_refused, spawn

NAMES = ("manifest.json", "tokenizer.json", "engines/ort-cpu/decoder.onnx.data")


def to_socket(path: Path) -> None:
    os.chdir(path.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": to_socket,
    "folder": os.mkdir,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return copy_bundle(tiny_bundle, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_is_no_regular_file_is_refused_at_once(make: Callable, name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    make(bundle / name)

    def read() -> None:
        Bundle.open(bundle).verify([name])

    with pytest.raises(BundleError, match=r"is (not a regular file|a link|missing|not listed)|cannot read") as raised:
        read()
    assert "\n" not in str(raised.value)


def test_a_pipe_for_a_manifest_does_not_hang_a_command(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    assert_refused(spawn("inspect", bundle, timeout=60), "manifest.json is not a regular file")


def test_a_manifest_of_gigabytes_is_not_read(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 3 << 30)
    with pytest.raises(BundleError, match=f"has {3 << 30} bytes .allowed: up to {MAX_MANIFEST_BYTES}"):
        Bundle.open(bundle)


def test_a_file_grown_to_gigabytes_is_not_read(bundle: Path) -> None:
    os.truncate(bundle / "tokenizer.json", 3 << 30)
    with pytest.raises(BundleError, match=rf"tokenizer\.json is damaged: it has {3 << 30} bytes, manifest\.json says"):
        Bundle.open(bundle).read_text("tokenizer.json")


def test_a_wrong_size_is_told_as_a_size(bundle: Path) -> None:
    edit_manifest(bundle, lambda m: m["files"]["tokenizer.json"].update(size=5))
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged: it has \d+ bytes, manifest\.json says 5$"):
        Bundle.open(bundle).verify()


@pytest.mark.parametrize("clutter", [".DS_Store", "Thumbs.db", "desktop.ini", "._decoder.onnx"])
def test_what_file_managers_leave_is_no_reason_to_refuse_a_bundle(clutter: str, bundle: Path) -> None:
    (bundle / "engines/ort-cpu" / clutter).write_bytes(b"x")
    Bundle.open(bundle).verify()


def test_thousands_of_nested_folders_are_walked(bundle: Path) -> None:
    try:
        deepest = nest(os.open(bundle / "engines", os.O_RDONLY), 1500)
        Bundle.open(bundle)
        os.close(os.open("plugin.so", os.O_CREAT | os.O_WRONLY, dir_fd=deepest))
        with pytest.raises(BundleError, match=r"plugin\.so is not listed"):
            Bundle.open(bundle)
        os.unlink("plugin.so", dir_fd=deepest)
        os.close(nest(deepest, 1500))  # deeper than a path may be long
        with pytest.raises(BundleError, match="File name too long"):
            Bundle.open(bundle)
    finally:
        subprocess.run(["rm", "-rf", bundle], check=True)  # Python's own way recurses


def nest(place: int, count: int) -> int:
    """Make `count` folders, each in the one before; takes and returns a descriptor."""
    for _ in range(count):
        os.mkdir("d", dir_fd=place)
        deeper = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = deeper
    return place


def test_a_file_is_what_was_opened_whatever_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with BundleFile(tmp_path, "f") as file:
        (tmp_path / "new").write_bytes(b"other")
        (tmp_path / "new").replace(tmp_path / "f")
        assert (file.read(100), file.size, bytes(file.map().memory)) == (b"old", 3, b"old")


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"{}", b'[{"kernels": 5}]'])
def test_kernels_json_that_is_damaged_is_refused_by_name(content: bytes, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    engine = opened.manifest.engines["ort-cpu"]
    (bundle / "engines/ort-cpu/kernels.json").write_bytes(content)
    rehash(bundle, "engines/ort-cpu/kernels.json")
    on_gpu = msgspec.structs.replace(engine, tensorrt=object())
    with pytest.raises(BundleError, match=r"kernels\.json: "):
        kernels_of(Bundle.open(bundle), on_gpu)
