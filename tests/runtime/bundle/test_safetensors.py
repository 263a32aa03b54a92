"""Expert weights as a mapped safetensors file: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moevlm.runtime.bundle.safetensors import Tensor, header_of, open_tensors
from moevlm.runtime.bundle.verified_file import BundleFile
from moevlm.runtime.core.dtypes import dtype_of
from moevlm.runtime.core.errors import BundleError


def read(path: Path) -> dict[str, Tensor]:
    with BundleFile(path.parent, path.name) as file:
        return open_tensors(file.map())


def written(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_tensors_are_those_that_safetensors_wrote(tmp_path) -> None:
    rng = np.random.default_rng(3)
    tensors = {
        "a": rng.standard_normal((3, 5), np.float32),
        "b": rng.standard_normal((2, 2)).astype(ml_dtypes.bfloat16),
        "c": rng.integers(-128, 128, 7, np.int8),
        "d": np.zeros((0, 4), np.float16),
        "e": rng.standard_normal(6).astype(ml_dtypes.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"note": "metadata"})
    found = read(tmp_path / "x.safetensors")
    assert {name: (t.dtype.safetensors, t.shape) for name, t in found.items()} == {
        "a": ("F32", (3, 5)),
        "b": ("BF16", (2, 2)),
        "c": ("I8", (7,)),
        "d": ("F16", (0, 4)),
        "e": ("F8_E4M3", (6,)),
    }
    assert all(found[name].data.tobytes() == array.tobytes() for name, array in tensors.items())
    assert not any(tensor.data.flags.writeable for tensor in found.values())


def entry(**changes: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{x", "its header is not valid JSON"),
        (b"[" * 100_000, "its header is not valid JSON"),
        (b"\xff\xff", "its header is not valid JSON"),
        (b'{"x": 1, "x": 2}', "duplicate name x"),
        ([], "not a JSON object"),
        (entry(dtype="F6"), "x has dtype 'F6' (supported: BF16,"),
        (entry(dtype=None), "x has dtype null"),
        ({"x": 3}, "tensor x needs exactly the fields"),
        (entry(more=1), "tensor x needs exactly the fields"),
        (entry(shape=[2, -1]), "x has shape [2, -1]"),
        (entry(shape=[True]), "x has shape [true]"),
        (entry(shape="2"), "x has shape '2'"),
        (entry(shape=[1] * 17), "x has shape"),
        (entry(data_offsets=[0]), "x has data_offsets [0]"),
        (entry(data_offsets=[0, 8.0]), "x has data_offsets [0, 8.0]"),
        (entry(data_offsets=[8, 0]), "x, F32 [2], needs 8 bytes, its data_offsets are [8, 0]"),
        (entry(data_offsets=[16, 24]), "x begins at data byte 16, the one before it ends at 0"),
        (entry(data_offsets=[0, 4]), "x, F32 [2], needs 8 bytes"),
        (entry(shape=[1 << 62, 1 << 62]), "needs"),
        (entry(), "there are bytes that belong to no tensor"),
        (entry(shape=[8], data_offsets=[0, 32]), "the file is truncated"),
        (
            entry() | {"y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
            "y begins at data byte 4, the one before it ends at 8",
        ),
    ],
)
def test_a_header_that_is_not_right_is_refused(tmp_path, header, reason) -> None:
    with pytest.raises(BundleError) as info:
        read(written(tmp_path / "x.safetensors", header, bytes(16)))
    assert reason in str(info.value)


def test_files_without_a_header_are_refused(tmp_path) -> None:
    for name, data in (("empty", b""), ("short", b"\1\0\0"), ("long", (10**6).to_bytes(8, "little") + b"{}")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BundleError, match=r"it is empty|its header length is"):
            read(tmp_path / name)
    with pytest.raises(BundleError, match="absent is missing"):
        read(tmp_path / "absent")


def test_a_header_that_was_written_is_read_back_and_ends_where_tensors_may_be_mapped(tmp_path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.int8)}
    header = header_of({name: (dtype_of(array.dtype), array.shape) for name, array in tensors.items()}, 4096)
    assert len(header) == 4096
    (tmp_path / "x").write_bytes(header + b"".join(array.tobytes() for array in tensors.values()))
    for name, tensor in read(tmp_path / "x").items():
        assert tensor.data.tobytes() == tensors[name].tobytes()
    for name, array in load_file(tmp_path / "x").items():
        np.testing.assert_array_equal(array, tensors[name])
