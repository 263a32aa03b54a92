"""Bad checkpoints, destinations and bundles: status 2, one line that says what and where, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.random_checkpoint import config, write
from moevlm.runtime.bundle.reader import Bundle
from tests.support.bundles import copy_bundle, edit_manifest, rehash
from tests.support.command_line import COMMAND, assert_refused, call, environment, refused_run, spawn
from tests.support.families import TINY
from tests.support.tiny import TinyCheckpoint, edit_json

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return copy_bundle(tiny_bundle, tmp_path)


def build(checkpoint: Path, *words: str) -> None:
    """Building a bundle beside the checkpoint must be refused, and leave nothing there."""
    before = set(checkpoint.parent.iterdir())
    assert_refused(call("build", checkpoint, "-o", checkpoint.parent / "out.moevlm"), *words)
    assert set(checkpoint.parent.iterdir()) == before


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Change one bit."""
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1 << bit]))


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Path to (sha256, modification time) of every file."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# Checkpoints.


def test_checkpoint_that_does_not_exist(tmp_path: Path) -> None:
    build(tmp_path / "nowhere", "no checkpoint directory at", "nowhere")


def test_missing_shard(tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint(shard_size="60KB").save(tmp_path / "sharded")
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    build(checkpoint, shards[1].name, f"of its {len(shards)} shards")


def test_truncated_weights(checkpoint: Path) -> None:
    os.truncate(checkpoint / WEIGHTS, (checkpoint / WEIGHTS).stat().st_size - 1000)
    build(checkpoint, WEIGHTS, "truncated", "data bytes")


@pytest.mark.parametrize(
    ("at", "bit", "word"), [(0, 0, "header"), (7, 7, "header length is"), (8, 1, "its header is not valid JSON")]
)
def test_flipped_bit_in_the_header(checkpoint: Path, at: int, bit: int, word: str) -> None:
    flip(checkpoint / WEIGHTS, at, bit)
    build(checkpoint, WEIGHTS, word)


@pytest.mark.parametrize(
    ("field", "word"),
    [
        (b'"dtype":"F', "(supported: BF16,"),
        (b'"shape":[', "needs"),
        (b'"data_offsets":[0,', "its data_offsets are"),
        (b'"lm_head.wei', "tensor"),
    ],
)
def test_flipped_bit_in_a_tensor_s_entry(checkpoint: Path, field: bytes, word: str) -> None:
    flip(checkpoint / WEIGHTS, (checkpoint / WEIGHTS).read_bytes().index(field) + len(field))
    build(checkpoint, "tensor", word)


def test_flipped_data_bit_is_found_by_sha256sums(checkpoint: Path) -> None:
    digest = hashlib.sha256((checkpoint / WEIGHTS).read_bytes()).hexdigest()
    (checkpoint / "SHA256SUMS").write_text(f"{digest}  {WEIGHTS}\n")
    flip(checkpoint / WEIGHTS, -1000)
    build(checkpoint, WEIGHTS, "damaged or was changed", digest, "SHA256SUMS")


@pytest.mark.parametrize("command", ["build", "parity"])
def test_flipped_data_bit_is_found_by_the_bundle(command: str, checkpoint: Path, bundle: Path) -> None:
    digest = hashlib.sha256((checkpoint / WEIGHTS).read_bytes()).hexdigest()
    flip(checkpoint / WEIGHTS, -1000)
    before, beside = snapshot(bundle), set(bundle.parent.iterdir())
    result = call(command, bundle, "--checkpoint", checkpoint, "--target", "ort-cpu")
    assert_refused(result, WEIGHTS, "is not the file that the bundle was exported from", digest)
    assert (snapshot(bundle), set(bundle.parent.iterdir())) == (before, beside)


def test_not_a_number_among_the_weights(checkpoint: Path) -> None:
    with (checkpoint / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\xc0\x7f")
    build(checkpoint, WEIGHTS, "tensor", "not finite")


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.norm.weight",  # small enough to lie in the graph's own file
        "model.language_model.layers.1.self_attn.q_norm.weight",
        "model.visual.patch_embed.proj.bias",
        "model.visual.blocks.1.norm2.bias",
    ],
)
def test_not_a_number_in_a_small_tensor(name: str, checkpoint: Path) -> None:
    with (checkpoint / WEIGHTS).open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = json.loads(file.read(length))[name]["data_offsets"][0]
        file.seek(8 + length + begin)
        file.write(b"\0\0\x80\xff")
    build(checkpoint, f"tensor {name} is not finite at [0]: the file is damaged")


def test_unsupported_architecture(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda fields: fields.update(model_type="llama"))
    build(
        checkpoint,
        'model_type = "llama"',
        "supported: " + ", ".join(sorted(TINY)),
    )


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_act", "relu2", ('text_config.hidden_act = "relu2"', "supported:", "silu")),
        ("sliding_window", 128, ("text_config.sliding_window = 128",)),
        ("num_hidden_layers", 10**6, ("text_config.num_hidden_layers = 1000000", "an integer from 1 to 1024")),
        ("hidden_size", 10**30, ("text_config.hidden_size = 1000000000", "an integer from 1 to 1048576")),
        ("rope_theta", 10**200, ("text_config.rope_theta",)),
        ("num_experts_per_tok", -1, ("text_config.num_experts_per_tok = -1", "an integer from 1 to 65536")),
    ],
)
def test_unsupported_field(checkpoint: Path, field: str, value: Any, words: tuple[str, ...]) -> None:
    edit_json(checkpoint / "config.json", lambda fields: fields["text_config"].update({field: value}))
    build(checkpoint, *words)


def test_config_that_is_not_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": ')
    build(checkpoint, "config.json is not valid JSON")


def test_unknown_target(checkpoint: Path) -> None:
    result = call("build", checkpoint, "-o", checkpoint.parent / "out.moevlm", "--target", "tpu")
    assert_refused(result, 'unknown target "tpu"', "allowed: reference, ort-cpu")


# Destinations.


def test_destination_that_is_not_a_bundle_is_left_untouched(checkpoint: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of it")
    before, beside = snapshot(work), set(tmp_path.iterdir())
    assert_refused(call("build", checkpoint, "-o", work), str(work), "exists and is not a bundle")
    assert (snapshot(work), set(tmp_path.iterdir())) == (before, beside)


def test_checkpoint_as_its_own_destination(checkpoint: Path) -> None:
    before = snapshot(checkpoint)
    assert_refused(call("build", checkpoint, "-o", checkpoint), "exists and is not a bundle")
    assert snapshot(checkpoint) == before


def test_destination_without_a_parent(checkpoint: Path, tmp_path: Path) -> None:
    assert_refused(call("build", checkpoint, "-o", tmp_path / "no/where"), "cannot write", "no/where")
    assert not (tmp_path / "no").exists()


def test_disk_that_is_full_half_way(checkpoint: Path, tmp_path: Path) -> None:
    # The kernel's limit on the size of a file, of which Python hears as an error: SIGXFSZ is ignored.
    limit = 100_000
    assert limit < (checkpoint / WEIGHTS).stat().st_size
    before = set(tmp_path.iterdir())
    result = spawn(
        *("build", checkpoint, "-o", tmp_path / "out.moevlm", "--target", "ort-cpu"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert_refused(result, "cannot write", "out.moevlm/engines/ort-cpu/", "File too large")
    assert set(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def larger_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 MB: it takes a moment to write."""
    folder = tmp_path_factory.mktemp("larger") / "checkpoint"
    size = write(folder, config(layers=3, hidden=512, experts=64, top_k=4, width=320, vocabulary=8000))
    assert size > 150e6
    return folder


@pytest.mark.parametrize(
    ("stop", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["ctrl-c", "sigterm", "sighup"],
)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replacing"])
def test_stopped_half_way(
    stop: signal.Signals, status: int, exists: bool, larger_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    if exists:
        copy_bundle(tiny_bundle, tmp_path)
    destination = tmp_path / "copy.moevlm"
    before = snapshot(tmp_path)
    process = subprocess.Popen(
        [COMMAND, "build", larger_checkpoint, "-o", destination, "--force", "--target", "ort-cpu"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs with &
    )
    try:
        while not any(path.stat().st_size for path in _unfinished(tmp_path)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (status, ""), err
    assert "Traceback" not in err
    assert snapshot(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == ({"copy.moevlm"} if exists else set())


def _unfinished(folder: Path) -> Iterator[Path]:
    yield from folder.glob(".copy.moevlm.*.partial/engines/ort-cpu/decoder.onnx.data")


# Bundles.


def test_bundle_that_does_not_exist(tmp_path: Path) -> None:
    for command in (
        ("inspect",),
        ("run", "--prompt", "Hi"),
        ("bench", "latency"),
        ("parity", "--checkpoint", tmp_path),
    ):
        assert_refused(call(*command, tmp_path / "nowhere"), "no bundle at", "nowhere")


def test_directory_that_is_not_a_bundle(tiny_checkpoint: Path) -> None:
    refused_run(
        tiny_checkpoint,
        "--prompt",
        "Hi",
        words=("is not a bundle: it has no manifest.json", f"moevlm build {tiny_checkpoint} -o"),
    )


USED = (
    *("tokenizer.json", "chat_template.jinja", "preprocessor.json", "video_preprocessor.json"),
    *("engines/ort-cpu/vision.onnx", "engines/ort-cpu/vision.onnx.data"),
    *("engines/ort-cpu/decoder.onnx", "engines/ort-cpu/decoder.onnx.data"),
)


@pytest.mark.parametrize("name", USED)
def test_changed_byte_in_a_bundle(name: str, bundle: Path) -> None:
    digest = Bundle.open(bundle).manifest.files[name].sha256
    flip(bundle / name, (bundle / name).stat().st_size // 2)
    refused_run(bundle, "--prompt", "Hi", words=(name, "damaged or was changed", digest))
    if name.startswith("engines"):
        assert_refused(call("parity", bundle, "--checkpoint", "."), name, "damaged or was changed")


def test_every_file_of_a_bundle_is_one_that_was_changed_above(bundle: Path) -> None:
    others = {"graphs/" + name.rpartition("/")[2] for name in USED if "engines" in name}  # of the target reference
    assert set(Bundle.open(bundle).manifest.files) == {*USED, *others}


def test_missing_file_in_a_bundle(bundle: Path) -> None:
    (bundle / "engines/ort-cpu/decoder.onnx.data").unlink()
    refused_run(bundle, "--prompt", "Hi", words=("engines/ort-cpu/decoder.onnx.data is missing",))


def test_unlisted_file_beside_an_engine(bundle: Path) -> None:
    (bundle / "engines/ort-cpu/extra.so").write_bytes(b"")
    refused_run(bundle, "--prompt", "Hi", words=("extra.so", "not listed in manifest.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(schema=99), ("schema = 99", "supported: 3")),
        (lambda m: m["model"].update(hidden="wide"), ("Expected `int`", "$.model.hidden")),
        (lambda m: m["model"].pop("context"), ("context",)),
        (lambda m: m["files"].update({"../x": m["files"]["tokenizer.json"]}), ("'../x'", "not a path inside")),
        (lambda m: m.update(surprise=1), ("surprise",)),
    ],
)
def test_changed_manifest(change: Callable[[dict[str, Any]], object], words: tuple[str, ...], bundle: Path) -> None:
    edit_manifest(bundle, change)
    refused_run(bundle, "--prompt", "Hi", words=("manifest.json", *words))


def test_graph_that_the_engine_refuses(bundle: Path) -> None:
    (bundle / "engines/ort-cpu/decoder.onnx").write_bytes(b"not a graph")
    rehash(bundle, "engines/ort-cpu/decoder.onnx")
    refused_run(bundle, "--prompt", "Hi", words=("engines/ort-cpu/decoder.onnx",))


@pytest.mark.parametrize("command", [("run", "--prompt", "Hi"), ("bench", "latency"), ("parity", "--checkpoint", ".")])
def test_absent_target_lists_those_there(command: tuple[str, ...], tiny_bundle: Path) -> None:
    result = call(*command, tiny_bundle, "--target", "trt")
    assert_refused(result, "'trt'", "available: ort-cpu, reference")


def test_bundle_without_an_engine(bundle: Path) -> None:
    edit_manifest(bundle, lambda m: m.update(engines={}))
    refused_run(bundle, "--prompt", "Hi", words=("has no engine yet",))


def test_manifest_with_a_damaged_verdict_is_still_shown(bundle: Path) -> None:
    edit_manifest(bundle, lambda m: m.update(parity={"ort-cpu": 5}))
    report = json.loads(call("inspect", bundle, "--json").out)
    assert [engine["parity"] for engine in report["engines"]] == ["not checked", "not checked"]
