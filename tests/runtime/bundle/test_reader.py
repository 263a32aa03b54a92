"""Opening a bundle: hashes, paths, engines, and one clear error for everything that is not as the manifest says."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError
from tests.support.bundles import edit_manifest

FILES = {
    "tokenizer.json": b'{"tokens": "\xc3\xa9"}',
    "engines/reference/vision.onnx": b"vision graph",
    "engines/reference/decoder.onnx": b"decoder graph",
    "engines/reference/decoder.onnx.data": bytes(range(256)) * 100,
    "engines/ort-cpu/vision.onnx": b"lowered vision graph",
    "engines/ort-cpu/decoder.onnx": b"lowered decoder graph",
}
MODEL = {
    "model_type": "toy", "hidden": 4, "vocabulary": 8, "context": 16, "eos_token_ids": [0], "image_token_id": 1,
    "layers": [{"heads": 1, "kv_heads": 1, "key_dim": 4, "value_dim": 4, "experts": 2, "top_k": 1}],
    "ropes": [{"dim": 2, "theta": 1e4, "sections": [1, 0, 0], "interleaved": False}],
    "vision": {
        "kind": "grid", "patch_size": 2, "temporal_patch_size": 1, "merge_size": 1, "channels": 3, "head_dim": 2,
        "rope_theta": 1e4, "position_grid": 2, "position_resampling": "bilinear", "deepstack": 0,
    },
}  # fmt: skip


def metadata(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def engine(target: str) -> dict[str, Any]:
    folder = "reference" if target == "reference" else "ort-cpu"
    graphs = {graph: f"engines/{folder}/{graph}.onnx" for graph in ("vision", "decoder")}
    return {**graphs, "dtype": "float32", "states": []}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    directory = tmp_path / "demo.moevlm"
    for name, data in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    manifest = {
        "schema": 3, "model": MODEL, "source": {}, "files": {name: metadata(data) for name, data in FILES.items()},
        "engines": {target: engine(target) for target in ("reference", "ort-cpu")}, "tools": {}, "parity": {},
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(manifest))
    edit_manifest(directory, lambda _: None)  # seals it
    return directory


def test_bundle_that_is_older_than_some_fields_opens_with_their_defaults(demo: Path) -> None:
    content = json.loads((demo / "manifest.json").read_text())
    assert "sparsity" not in content["engines"]["ort-cpu"]
    compact = json.dumps(content | {"digest": ""}, separators=(",", ":"))
    assert content["digest"] == hashlib.sha256(compact.encode()).hexdigest()
    found = Bundle.open(demo).manifest.engines["ort-cpu"]
    assert (found.sparsity, found.tensorrt, found.cost, found.group_size, found.kv_cache) == ("", None, None, 0, "")


def refused(act: Callable[[], Any], *words: str) -> None:
    with pytest.raises(BundleError) as raised:
        act()
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_whole_bundle_verifies_and_reports_progress(demo: Path) -> None:
    bundle, seen = Bundle.open(demo), []
    bundle.verify(progress=lambda done, total: seen.append((done, total)))
    size = sum(map(len, FILES.values()))
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)
    assert bundle.manifest.model.ropes[0].sections == (1, 0, 0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, -1])
def test_changed_byte_in_any_file_is_refused_by_name(demo: Path, name: str, position: int) -> None:
    content = bytearray(FILES[name])
    content[position] ^= 1
    (demo / name).write_bytes(bytes(content))
    expected = metadata(FILES[name])["sha256"]
    refused(Bundle.open(demo).verify, name, expected, hashlib.sha256(content).hexdigest())
    refused(lambda: Bundle.open(demo).verify([name]), name)
    Bundle.open(demo).verify([other for other in FILES if other != name])


@pytest.mark.parametrize("name", FILES)
def test_missing_or_shortened_file_is_refused_by_name(demo: Path, name: str) -> None:
    (demo / name).write_bytes(FILES[name][:-1])
    refused(Bundle.open(demo).verify, name, "bytes")
    (demo / name).unlink()
    refused(Bundle.open(demo).verify, name, "is missing")


def test_changed_text_is_refused_when_it_is_read(demo: Path) -> None:
    assert Bundle.open(demo).read_text("tokenizer.json") == '{"tokens": "é"}'
    (demo / "tokenizer.json").write_bytes(FILES["tokenizer.json"].replace(b"tokens", b"tokenz"))
    refused(lambda: Bundle.open(demo).read_text("tokenizer.json"), "tokenizer.json", "sha256")


def test_no_changed_bit_of_the_manifest_goes_unnoticed(demo: Path) -> None:
    content, fine = (demo / "manifest.json").read_bytes(), Bundle.open(demo).manifest
    for position in range(len(content)):
        flipped = content[position] ^ (1 << position % 8)
        (demo / "manifest.json").write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
        try:
            assert Bundle.open(demo).manifest == fine, f"byte {position}: {content[position - 20 : position + 20]!r}"
        except BundleError as error:
            assert "manifest.json" in str(error) or "engines" in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m.update(schema=1, model={}),
            ["schema = 1", "supported: 3", "build it again", "moevlm build CHECKPOINT -o", "--force"],
        ),
        (lambda m: m.update(schema=4, colour="red"), ["schema = 4", "supported: 3", "a newer moevlm made it"]),
        (lambda m: m.pop("schema"), ["schema"]),
        (lambda m: m.pop("engines"), ["engines"]),
        (lambda m: m.update(colour="red"), ["colour"]),
        (lambda m: m["model"].pop("context"), ["context", "$.model"]),
        (lambda m: m["model"].update(hidden="4"), ["$.model.hidden"]),
        (lambda m: m["files"]["tokenizer.json"].update(sha256="12"), ["sha256", "tokenizer.json"]),
        (lambda m: m["files"]["tokenizer.json"].update(size=-1), ["size", "tokenizer.json"]),
        (lambda m: m["engines"]["reference"].update(vision="tokenizer.jso"), ["engines.reference", "tokenizer.jso"]),
    ],
)
def test_malformed_manifest_names_the_field(demo: Path, change: Callable[[dict], Any], words: list[str]) -> None:
    edit_manifest(demo, change)
    refused(lambda: Bundle.open(demo), "manifest.json", *words)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"schema": "\xff"}'])
def test_manifest_that_is_not_json_is_refused(demo: Path, content: bytes) -> None:
    (demo / "manifest.json").write_bytes(content)
    refused(lambda: Bundle.open(demo), "manifest.json")


def test_directory_without_manifest_and_missing_directory_are_refused(tmp_path: Path) -> None:
    refused(lambda: Bundle.open(tmp_path), "is not a bundle", "manifest.json")
    refused(lambda: Bundle.open(tmp_path / "nowhere"), "no bundle at", "nowhere")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "", "a//b", "./a", "a\\b", "a\0b"])
def test_path_that_leaves_the_bundle_is_refused(demo: Path, name: str) -> None:
    (demo.parent / "outside").write_bytes(b"x")
    edit_manifest(demo, lambda m: m["files"].update({name: metadata(b"x")}))
    refused(lambda: Bundle.open(demo), repr(name), "not a path inside the bundle")


@pytest.mark.parametrize("whole_folder", [False, True])
def test_link_out_of_the_bundle_is_refused(demo: Path, whole_folder: bool) -> None:
    inside = demo / "engines/reference" if whole_folder else demo / "engines/reference/vision.onnx"
    outside = demo.parent / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    if whole_folder:
        refused(lambda: Bundle.open(demo), "engines/reference", "not listed")
    else:
        bundle = Bundle.open(demo)
        refused(bundle.verify, "engines/reference/vision.onnx", "outside the bundle")
        refused(lambda: bundle.path("engines/reference/vision.onnx"), "outside the bundle")


def test_linked_folder_outside_engines_is_refused(demo: Path) -> None:
    (demo.parent / "outside").mkdir()
    (demo.parent / "outside" / "notes.txt").write_bytes(b"x")
    (demo / "graphs").symlink_to(demo.parent / "outside")
    edit_manifest(demo, lambda m: m["files"].update({"graphs/notes.txt": metadata(b"x")}))
    refused(lambda: Bundle.open(demo).read_text("graphs/notes.txt"), "outside the bundle")


def test_bundle_may_itself_be_reached_by_a_link(demo: Path) -> None:
    (demo.parent / "link").symlink_to(demo)
    Bundle.open(demo.parent / "link").verify()


@pytest.mark.parametrize("name", ["engines/plugin.so", "engines/ort-cpu/decoder.onnx.data", "engines/new/a.plan"])
def test_unlisted_file_among_the_engines_is_refused(demo: Path, name: str) -> None:
    (demo / name).parent.mkdir(exist_ok=True)
    (demo / name).write_bytes(b"x")
    refused(lambda: Bundle.open(demo), name, "not listed")


def test_unlisted_file_is_not_served(demo: Path) -> None:
    (demo / "notes.txt").write_text("x")
    refused(lambda: Bundle.open(demo).path("notes.txt"), "has no file notes.txt")


def test_absent_target_lists_those_that_are_there(demo: Path) -> None:
    refused(lambda: Bundle.open(demo).engine("rtx:sm89"), "rtx:sm89", "available: ort-cpu, reference")


def test_files_of_an_engine_include_its_external_data(demo: Path) -> None:
    names = Bundle.open(demo).engine_files("reference")
    assert set(names) == {name for name in FILES if name.startswith("engines/reference/")}


def test_import_is_light() -> None:
    code = (
        "import sys, moevlm.runtime.bundle.reader; "
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
