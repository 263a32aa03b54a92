"""Reading a Hugging Face directory: what is accepted, and one clear error for everything that is damaged."""

import hashlib
import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moevlm.export.checkpoint.directory import Checkpoint, require_same_source
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.rearranged import swap_last
from moevlm.export.graph.weights import SLICE_BYTES, Concat, Constant, PerRow, Stack, read, slices
from moevlm.runtime.core.errors import CheckpointError
from moevlm.runtime.core.manifest import LayerMetadata, Manifest, ModelMetadata, RopeMetadata
from moevlm.runtime.core.towers import GridTower
from tests.support.tiny import edit_json

RNG = np.random.default_rng(7)
TENSORS = {
    "a.weight": RNG.standard_normal((6, 4), dtype=np.float32),
    "b.weight": RNG.standard_normal((3, 5, 2), dtype=np.float32).astype(ml_dtypes.bfloat16),
    "c.weight": RNG.standard_normal(9).astype(np.float16),
    "d.scale": np.array(2.5, np.float32),
    "e.index": np.arange(4, dtype=np.int64),
    "f.empty": np.zeros((0, 3), np.float32),
    "g.flag": np.array([True, False]),
}


def save_single(directory: Path, tensors: dict[str, np.ndarray] = TENSORS) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "toy", "hidden_size": 4}')
    save_file(tensors, directory / "model.safetensors")
    return directory


def save_sharded(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    weight_map = {}
    for number, names in enumerate((["a.weight", "c.weight"], ["b.weight", "d.scale"]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in names}, directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_parts(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


def refused(directory: Path, *words: str, act: Callable[[Checkpoint], Any] | None = None) -> None:
    """Opening (and, if given, `act`) raises CheckpointError, in one line that has all the words."""
    with pytest.raises(CheckpointError) as raised:
        checkpoint = Checkpoint.open(directory)
        if act:
            act(checkpoint)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 1000
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", TENSORS)
def test_every_dtype_and_shape_is_read_as_the_safetensors_library_wrote_it(tmp_path: Path, name: str) -> None:
    weight = Checkpoint.open(save_single(tmp_path / "m")).weight(name)
    expected = TENSORS[name]
    assert (weight.shape, weight.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(read(weight), expected)
    if expected.ndim:
        np.testing.assert_array_equal(weight.rows(1, 3), expected[1:3])


def test_sharded_checkpoint_reads_like_a_single_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_sharded(tmp_path / "m"))
    assert checkpoint.shards == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name, weight in checkpoint.tensors.items():
        np.testing.assert_array_equal(read(weight), TENSORS[name])


def test_unknown_tensor_is_named(tmp_path: Path) -> None:
    refused(save_single(tmp_path / "m"), "no tensor layers.9.q", act=lambda c: c.weight("layers.9.q"))


def test_missing_directory_and_missing_weights_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no checkpoint directory", "nowhere")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no weights", "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_directory_with_pickled_weights_only_is_refused_with_a_hint(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, "no safetensors file", name, "convert")


@pytest.mark.parametrize(("text", "words"), [(None, "has no config.json"), ("{", "JSON"), ("[1]", "JSON object")])
def test_missing_or_invalid_config_is_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    directory = save_single(tmp_path / "m")
    (directory / "config.json").unlink()
    if text is not None:
        (directory / "config.json").write_text(text)
    refused(directory, words, "config.json")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    directory = save_sharded(tmp_path / "m")
    (directory / "model-00002-of-00002.safetensors").unlink()
    refused(directory, "lacks model-00002-of-00002.safetensors", "2 shards")


def test_index_that_names_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    directory = save_sharded(tmp_path / "m")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(directory, "ghost.weight", "model-00001-of-00002.safetensors")


def test_index_that_lacks_a_tensor_of_its_shards_is_refused(tmp_path: Path) -> None:
    directory = save_sharded(tmp_path / "m")
    edit_json(directory / "model.safetensors.index.json", lambda index: index["weight_map"].pop("b.weight"))
    shard = "model-00002-of-00002.safetensors"
    refused(directory, f"index.json does not name tensors that its shards hold: b.weight ({shard})")


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    directory, shard = save_sharded(tmp_path / "m"), "model-00002-of-00002.safetensors"
    save_file({name: TENSORS[name] for name in ("a.weight", "b.weight", "d.scale")}, directory / shard)
    refused(directory, f"a.weight ({shard})")


@pytest.mark.parametrize(
    "name", ["model-00003-of-00003.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"]
)
@pytest.mark.parametrize("save", [save_single, save_sharded], ids=["single", "sharded"])
def test_file_of_weights_that_is_not_the_model_s_is_refused_by_name(
    save: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    directory = save(tmp_path / "m")
    (directory / "consolidated.safetensors").write_bytes(b"another program's copy")
    Checkpoint.open(directory)
    save_file({"z.weight": np.ones(3, np.float32)}, directory / name)
    refused(directory, f"has {name}", "allowed: model.safetensors alone, or")


@pytest.mark.parametrize(
    "shard",
    [
        "../other.safetensors",
        "/etc/x.safetensors",
        7,
        f"{'x' * 5000}.safetensors",
        "a\0.safetensors",
    ],
    ids=lambda shard: ascii(shard)[:20],
)
def test_index_that_names_no_file_of_the_directory_is_refused(tmp_path: Path, shard: object) -> None:
    directory = save_sharded(tmp_path / "m")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": shard}}))
    refused(directory, "a.weight", repr(shard)[:20], "not a shard's file name")


@pytest.mark.parametrize("kept", [0, 7, 8, 60, -1, -60])
def test_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = save_single(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(path.parent, str(path), "not a whole safetensors file")


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = save_single(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path.parent, "belong to no tensor")


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bit_in_the_header_length_is_refused(tmp_path: Path, position: int, bit: int) -> None:
    path = save_single(tmp_path / "m") / "model.safetensors"
    flip(path, position, bit)
    refused(path.parent, str(path), "not a whole safetensors file")


def test_every_flipped_bit_in_the_header_is_refused_or_changes_a_name(tmp_path: Path) -> None:
    """A header that stays readable has another name, shape or dtype in it, which the model's loader asks for."""
    path = save_single(tmp_path / "m", {"w": TENSORS["a.weight"], "v": TENSORS["c.weight"]}) / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    metadata = {n: (w.shape, w.dtype) for n, w in Checkpoint.open(path.parent).tensors.items()}
    refusals = 0
    for position in range(8, 8 + len(content[8 : 8 + length].rstrip())):
        flip(path, position, 2)
        try:
            tensors = Checkpoint.open(path.parent).tensors
        except CheckpointError as error:
            assert str(path) in str(error)
            refusals += 1
        else:
            assert {n: (w.shape, w.dtype) for n, w in tensors.items()} != metadata
        path.write_bytes(content)
    assert refusals > 0.8 * length


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": "F99"}, "F99"),
        ({"shape": [6, -4]}, "shape"),
        ({"shape": [6, True]}, "shape"),
        ({"shape": [6, 5]}, "needs 120 bytes"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [8, 104]}, "begins at data byte 8"),
        ({"extra": 1}, "exactly the fields"),
    ],
)
def test_wrong_header_entry_names_file_and_tensor(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    path = save_single(tmp_path / "m", {"a.weight": TENSORS["a.weight"]}) / "model.safetensors"
    header, data = parts(path)
    header["a.weight"] |= change
    write_parts(path, header, data)
    refused(path.parent, str(path), "a.weight", word)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    path = save_single(tmp_path / "m", {"v": np.ones(4, np.float32), "w": np.ones(4, np.float32)}) / "model.safetensors"
    header, data = parts(path)
    header["w"] = header["v"]
    write_parts(path, header, data)
    refused(path.parent, str(path), "begins at data byte 0, the one before it ends at 16")


@pytest.mark.parametrize("text", [b"[]", b"{}}", b"\xff\xfe{}", b'{"w": {}, "w": {}}', b"[" * 100_000])
def test_header_that_is_not_a_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    path = save_single(tmp_path / "m") / "model.safetensors"
    write_parts(path, text, b"")
    refused(path.parent, str(path), "not a whole safetensors file")


def test_duplicate_among_many_names_is_found_at_once(tmp_path: Path) -> None:
    entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    names = [*(f"layers.{i}.weight" for i in range(300_000)), "layers.299999.weight"]
    path = save_single(tmp_path / "m") / "model.safetensors"
    write_parts(path, b"{" + b",".join(b'"%s":%s' % (name.encode(), entry) for name in names) + b"}", b"")
    refused(path.parent, "duplicate name layers.299999.weight")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a" * 10**5, {"shape": [5]}),
        ("a", {"dtype": "x" * 10**5}),
        ("a", {"shape": [10**18] * 10**5}),
        ("a", {"shape": [10**30]}),
        ("a", {"data_offsets": [1] * 10**5}),
    ],
    ids=["name", "dtype", "rank", "shape", "data_offsets"],
)
def test_long_values_of_a_header_are_cut_in_messages(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    path = save_single(tmp_path / "m", {"a": TENSORS["a.weight"]}) / "model.safetensors"
    header, data = parts(path)
    write_parts(path, {name: header["a"] | change}, data)
    refused(path.parent, str(path))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_value_that_is_not_finite_names_tensor_and_place(tmp_path: Path, dtype: Any, value: float) -> None:
    array = RNG.standard_normal((5, 3)).astype(dtype)
    array[3, 1] = value
    directory = save_single(tmp_path / "m", {"ok": np.ones(3, np.float32), "layers.0.q": array})
    assert read(Checkpoint.open(directory).weight("ok")).sum() == 3
    refused(directory, "model.safetensors", "layers.0.q", "[3, 1]", act=lambda c: c.weight("layers.0.q").rows(2, 5))


def test_largest_finite_values_are_accepted(tmp_path: Path) -> None:
    tensors = {}
    for dtype in (np.float16, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        info = ml_dtypes.finfo(dtype)
        tensors[str(np.dtype(dtype))] = np.array([info.max, info.min, info.smallest_subnormal, -0.0], dtype)
    checkpoint = Checkpoint.open(save_single(tmp_path / "m", tensors))
    for name, array in tensors.items():
        np.testing.assert_array_equal(read(checkpoint.weight(name)).view(np.uint8), array.view(np.uint8))


def test_flipped_exponent_bit_in_the_data_is_refused_as_not_finite(tmp_path: Path) -> None:
    path = save_single(tmp_path / "m", {"w": np.ones(64, ml_dtypes.bfloat16)}) / "model.safetensors"
    flip(path, path.stat().st_size - 1, 6)  # 0x3f80 -> 0x7f80
    refused(path.parent, "tensor w is not finite at [63]", act=lambda c: read(c.weight("w")))


def test_flipped_bit_in_the_data_is_refused_by_sha256sums(tmp_path: Path) -> None:
    path = save_single(tmp_path / "m") / "model.safetensors"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "SHA256SUMS").write_text(f"{expected}  model.safetensors\n{'0' * 64} *README.md\n")
    assert Checkpoint.open(path.parent).verify() == ("model.safetensors",)
    flip(path, path.stat().st_size - 60)
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    refused(path.parent, str(path), expected, actual, "SHA256SUMS", act=lambda c: c.verify())


def test_malformed_sha256sums_names_its_line(tmp_path: Path) -> None:
    directory = save_single(tmp_path / "m")
    (directory / "SHA256SUMS").write_text("\nabc model.safetensors\n")
    refused(directory, "SHA256SUMS line 2", act=lambda c: c.verify())


def test_flipped_bit_is_refused_by_the_downloaders_record(tmp_path: Path) -> None:
    path = save_single(tmp_path / "m") / "model.safetensors"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    records = path.parent / ".cache/huggingface/download"
    records.mkdir(parents=True)
    (records / "model.safetensors.metadata").write_text(f"{'c' * 40}\n{expected}\n1712656091.123\n")
    (records / "config.json.metadata").write_text(f"{'c' * 40}\n{'a' * 40}\n1712656091.123\n")  # a git blob's id
    assert Checkpoint.open(path.parent).verify() == ("model.safetensors",)
    flip(path, path.stat().st_size - 60)
    refused(path.parent, expected, ".cache/huggingface/download", act=lambda c: c.verify())


def test_flipped_bit_is_refused_by_the_cache_blobs_name(tmp_path: Path) -> None:
    stored = save_single(tmp_path / "models--a--b/snapshots/1") / "model.safetensors"
    expected = hashlib.sha256(stored.read_bytes()).hexdigest()
    blob = tmp_path / "models--a--b/blobs" / expected
    blob.parent.mkdir()
    stored.rename(blob)
    stored.symlink_to(blob)
    assert Checkpoint.open(stored.parent).verify() == ("model.safetensors",)
    flip(blob, blob.stat().st_size - 60)
    refused(stored.parent, expected, "blob", act=lambda c: c.verify())


def test_verify_without_known_hashes_reads_nothing(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_single(tmp_path / "m"))
    (tmp_path / "m" / "model.safetensors").unlink()
    assert checkpoint.verify() == ()


def test_file_replaced_while_in_use_is_noticed(tmp_path: Path) -> None:
    directory = save_single(tmp_path / "m")

    def replace(checkpoint: Checkpoint) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
        checkpoint.weight("a.weight").rows(0, 1)

    refused(directory, "model.safetensors", "changed while it was in use", act=replace)


def test_fingerprint_covers_config_and_shards(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_sharded(tmp_path / "m"))
    checkpoint.start_hashing()
    metadata = checkpoint.fingerprint()
    assert set(metadata) == {"config.json", *checkpoint.shards}
    for name, entry in metadata.items():
        content = (checkpoint.directory / name).read_bytes()
        assert (entry.sha256, entry.size) == (hashlib.sha256(content).hexdigest(), len(content))


def manifest_of(checkpoint: Checkpoint) -> Manifest:
    rope = RopeMetadata(dim=2, theta=1e4, sections=(1, 0, 0), interleaved=False)
    layer = LayerMetadata(heads=1, kv_heads=1, key_dim=4, value_dim=4, experts=2, top_k=1)
    vision = GridTower(
        patch_size=2, temporal_patch_size=1, merge_size=1, channels=3, head_dim=2, rope_theta=1e4,
        position_grid=2, position_resampling="bilinear", deepstack=0,
    )  # fmt: skip
    model = ModelMetadata(
        model_type="toy", hidden=4, vocabulary=8, context=16, layers=(layer,), eos_token_ids=(0,),
        image_token_id=1, ropes=(rope,), vision=vision,
    )  # fmt: skip
    return Manifest(schema=3, model=model, source=checkpoint.fingerprint(), files={}, engines={}, tools={})


def test_same_source_is_accepted_and_a_flipped_byte_is_not(tmp_path: Path) -> None:
    directory = save_single(tmp_path / "m")
    manifest = manifest_of(Checkpoint.open(directory))
    require_same_source(manifest, Checkpoint.open(directory))
    path = directory / "model.safetensors"
    flip(path, path.stat().st_size - 60)
    expected = manifest.source["model.safetensors"].sha256
    refused(directory, str(path), expected, act=lambda c: require_same_source(manifest, c))


def test_other_shards_or_sizes_are_not_the_same_source(tmp_path: Path) -> None:
    manifest = manifest_of(Checkpoint.open(save_single(tmp_path / "m")))
    other = save_sharded(tmp_path / "n")
    refused(other, "model-00001-of-00002", "model.safetensors", act=lambda c: require_same_source(manifest, c))
    (tmp_path / "m" / "config.json").write_text("{ }")
    refused(tmp_path / "m", "config.json", "3 bytes", act=lambda c: require_same_source(manifest, c))


def test_streamed_rearrangements_equal_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moevlm.export.graph.weights.SLICE_BYTES", 1000)
    matrix, experts = RNG.standard_normal((70, 33)), RNG.standard_normal((3, 20, 50), dtype=np.float32)
    joined = Concat([Constant(matrix), Constant(-matrix)])
    assert len(list(slices(joined))) > 1
    np.testing.assert_array_equal(read(joined), np.concatenate([matrix, -matrix]))
    np.testing.assert_array_equal(read(swap_last(Constant(experts))), experts.swapaxes(1, 2))


def test_slices_stay_small_through_a_chain() -> None:
    source = Constant(np.zeros((4096, 4096), np.float32))
    sizes = {piece.nbytes for piece in slices(PerRow(source, source.shape, source.dtype, lambda a: a + 1))}
    assert sizes == {SLICE_BYTES}


def test_experts_of_mixed_dtypes_are_read_in_the_dtype_that_holds_all() -> None:
    parts = [np.full((2, 3), 1.0, np.float16), np.full((2, 3), 1 + 2**-20, np.float32)]
    for stacked in (Stack([Constant(p) for p in parts]), Stack([Concat([Constant(p)]) for p in parts])):
        for row, part in enumerate(parts):
            read = stacked.rows(row, row + 1)
            assert (read.dtype, stacked.dtype) == (np.float32, np.float32)
            assert np.array_equal(read[0], part)


@pytest.mark.parametrize("width", [40, 5000])
def test_columns_of_short_and_long_rows_are_read_and_checked(width: int, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).standard_normal((70, width), np.float32)
    stored[3, 20] = np.inf
    tensor = Checkpoint.open(save_single(tmp_path / "checkpoint", {"a": stored})).weight("a")
    for start, stop in ((0, 20), (21, width), (7, 7), (30, 31)):
        np.testing.assert_array_equal(tensor.columns(start, stop), stored[:, start:stop])
    for start, stop in ((17, 30), (0, width)):
        read_them = partial(Stored.columns, tensor, start, stop)
        refused(tmp_path / "checkpoint", "tensor a is not finite at [3, 20]", act=lambda _, run=read_them: run())
