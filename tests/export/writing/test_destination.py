"""Where a bundle is written: nothing of somebody else's is overwritten, and no process overwrites another's work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from moevlm.export.build import add_targets, build
from moevlm.export.writing.bundle_writer import BundleWriter
from moevlm.export.writing.destination import locked
from moevlm.export.writing.verdicts import note, reserve
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BuildError
from tests.support.bundles import copy_bundle
from tests.support.command_line import assert_refused, call


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return copy_bundle(tiny_bundle, tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_file(bundle: Path, name: str, *, progress: Callable[[str, int, int], None] = lambda *_: None) -> None:
    """Change a bundle as `add_targets` does, but for the targets."""
    with locked(bundle, progress):
        existing = Bundle.open(bundle)
        with BundleWriter(bundle, changes=existing) as writer:
            writer.add_bytes(name, name.encode())
            writer.keep(existing)
            writer.commit(existing.manifest)


def test_a_bundle_is_replaced_by_force_only(bundle: Path, tiny_checkpoint: Path) -> None:
    before = contents(bundle)
    remedy = f"moevlm build {bundle} --checkpoint {tiny_checkpoint} --target"
    result = call("build", tiny_checkpoint, "-o", bundle)
    assert_refused(result, "is a bundle already", remedy, "--force replaces it")
    assert contents(bundle) == before
    assert call("build", tiny_checkpoint, "-o", bundle, "--force", "--target", "cpu:int4").status == 0
    assert [*Bundle.open(bundle).manifest.engines] == ["cpu:int4"]


@pytest.mark.parametrize("name", ["README.md", "mine/notes.txt", "engines/ort-cpu/mine.txt", "graphs/mine.txt"])
def test_what_is_not_the_bundle_s_is_never_replaced(name: str, bundle: Path, tiny_checkpoint: Path) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("mine")
    before = contents(bundle)
    result = call("build", tiny_checkpoint, "-o", bundle, "--force")
    assert_refused(result, name, "not the bundle's", "move them away")
    assert contents(bundle) == before
    with pytest.raises(BuildError, match="not the bundle's"), BundleWriter(bundle):
        pass


def test_what_comes_into_a_bundle_while_it_is_replaced_is_not_lost(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    with pytest.raises(BuildError, match=r"late\.txt"), BundleWriter(bundle) as writer:
        (bundle / "late.txt").write_text("mine")
        writer.commit(msgspec.structs.replace(manifest, engines={}))
    assert (bundle / "late.txt").read_text() == "mine"
    Bundle.open(bundle).verify()


def test_a_folder_with_something_like_a_manifest_is_not_deleted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"schema": 1, "files": {}, "engines": {}}')
    (folder / "precious.txt").write_text("mine")
    assert_refused(call("build", tiny_checkpoint, "-o", folder, "--force"), "precious.txt")
    assert (folder / "precious.txt").read_text() == "mine"


def test_other_files_stay_when_a_bundle_is_changed(bundle: Path) -> None:
    (bundle / "README.md").write_text("mine")
    (bundle / "mine").mkdir()
    (bundle / "mine/link").symlink_to("../README.md")
    os.mkfifo(bundle / "mine/pipe")
    (bundle / ".DS_Store").write_bytes(b"x")
    add_file(bundle, "new.txt")
    Bundle.open(bundle).verify()
    assert (bundle / "README.md").read_text() == "mine"
    assert (bundle / "mine/link").readlink() == Path("../README.md")
    assert (bundle / "mine/pipe").is_fifo()
    assert "README.md" not in Bundle.open(bundle).manifest.files


def test_a_checkpoint_that_is_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert_refused(call("build", tmp_path / "loop", "-o", tmp_path / "new.moevlm"), "no checkpoint directory at")
    assert_refused(call("build", tmp_path / "loop/x", "-o", tmp_path / "loop/new"), "no checkpoint directory at")
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("place", ["inside", "inside/engines/deeper"])
def test_a_bundle_inside_a_bundle_is_refused(place: str, bundle: Path, tiny_checkpoint: Path) -> None:
    before = contents(bundle)
    (bundle / "inside/engines").mkdir(parents=True)
    (bundle / "inside/engines/deeper").mkdir()
    target = bundle / place / "new.moevlm"
    assert_refused(call("build", tiny_checkpoint, "-o", target), "lies inside the bundle", str(bundle))
    assert contents(bundle) == before


def test_a_bundle_inside_its_checkpoint_is_refused(tiny_checkpoint: Path) -> None:
    before = contents(tiny_checkpoint)
    for place in (tiny_checkpoint / "out.moevlm", tiny_checkpoint.parent / tiny_checkpoint.name / "a" / "b"):
        assert_refused(call("build", tiny_checkpoint, "-o", place), "lies inside the checkpoint")
    assert contents(tiny_checkpoint) == before


def test_a_destination_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, tiny_bundle: Path) -> None:
    manifest = msgspec.structs.replace(Bundle.open(tiny_bundle).manifest, engines={})
    with pytest.raises(BuildError, match="was made by somebody else meanwhile"), BundleWriter(tmp_path / "b") as writer:
        (tmp_path / "b").mkdir()
        (tmp_path / "b/mine.txt").write_text("mine")
        writer.commit(manifest)
    assert contents(tmp_path) == {"b/mine.txt": b"mine"}


def test_two_that_change_a_bundle_at_once_wait_for_each_other(bundle: Path) -> None:
    told, names = [], [f"{i}.txt" for i in range(6)]
    threads = [threading.Thread(target=add_file, args=(bundle, name), kwargs={"progress": lambda *a: told.append(a)})
               for name in names]  # fmt: skip
    with locked(bundle, lambda *_: None):
        for thread in threads:
            thread.start()
        while len(told) < len(threads):
            threading.Event().wait(0.01)
    for thread in threads:
        thread.join()
    assert {words for words, _, _ in told} == {f"waiting for another process that changes {bundle}"}
    assert set(names) <= set(Bundle.open(bundle).manifest.files)
    Bundle.open(bundle).verify()


def test_two_that_add_targets_at_once_both_have_theirs(bundle: Path, tiny_checkpoint: Path) -> None:
    targets = ("cpu:int4", "cpu:int8")
    errors: list[BaseException] = []

    def add(target: str) -> None:
        try:
            add_targets(bundle, tiny_checkpoint, [target])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=add, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert set(Bundle.open(bundle).manifest.engines) == {"reference", "ort-cpu", *targets}
    Bundle.open(bundle).verify()


HOLD = """
import sys
from pathlib import Path
from moevlm.export.writing.destination import locked
from moevlm.export.writing.verdicts import note, reserve
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_holds_nobody_back(bundle: Path) -> None:
    command = [sys.executable, "-c", HOLD, bundle]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        told: list[str] = []

        def kill(what: str, *_: int) -> None:
            told.append(what)
            process.send_signal(signal.SIGKILL)

        add_file(bundle, "new.txt", progress=kill)
    assert told == [f"waiting for another process that changes {bundle}"]
    assert "new.txt" in Bundle.open(bundle).manifest.files


def test_without_locks_a_change_by_another_process_is_found(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    existing = Bundle.open(bundle)
    with (
        pytest.raises(BuildError, match="changed by another process meanwhile"),
        BundleWriter(bundle, changes=existing) as writer,
    ):
        writer.keep(existing)
        add_file(bundle, "other.txt")
        writer.commit(existing.manifest)
    assert "other.txt" in Bundle.open(bundle).manifest.files


def test_a_killed_build_s_folder_is_removed_by_the_next_at_once(tiny_bundle: Path, tmp_path: Path) -> None:
    for name in (".b.0badcafe.partial", ".b.notours.partial", ".b.0badcafe.partial.txt"):
        (tmp_path / name).mkdir()
    manifest = msgspec.structs.replace(Bundle.open(tiny_bundle).manifest, engines={})
    with BundleWriter(tmp_path / "b") as writer:
        writer.commit(manifest)
    assert {path.name for path in tmp_path.iterdir()} == {"b", ".b.notours.partial", ".b.0badcafe.partial.txt"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--experts", "int4"), ("--experts has no effect on cpu:int8", "rtx and trt")),
        (("--max-sequences", "9"), ("--max-sequences",)),
        (("--max-sequences", "64"), ("--max-sequences",)),  # the default, but given
        (("--dtype", "fp16", "--target", "ort-cpu"), ("--dtype has no effect on ort-cpu",)),
        (("--group-size", "128", "--target", "ort-cpu"), ("--group-size", "int8, int4")),
        (("--group-size", "128", "--target", "rtx:sm89"), ("--group-size", "--experts")),
        (("--kv-cache", "float32", "--target", "ort-cpu:int8"), ("--kv-cache has no effect on ort-cpu:int8",)),
        (("--version-compatible", "--target", "rtx:sm89"), ("--version-compatible", "trt")),
        (("--native-moe",), ("--native-moe", "trt")),
    ],
)
def test_an_option_without_effect_is_refused(
    options: tuple[str, ...], words: tuple[str, ...], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert_refused(call("build", tiny_checkpoint, "-o", tmp_path / "b", *options), *words)
    assert not (tmp_path / "b").exists()


def test_an_option_that_counts_for_one_of_the_targets_is_taken(tiny_checkpoint: Path, tmp_path: Path) -> None:
    targets = ("--target", "ort-cpu", "--target", "cpu:int8")
    assert call("build", tiny_checkpoint, "-o", tmp_path / "b", *targets, "--kv-cache", "float32").status == 0
    engines = json.loads((tmp_path / "b/manifest.json").read_text())["engines"]
    assert {state["dtype"] for state in engines["cpu:int8"]["states"]} == {"float32"}
    with pytest.raises(BuildError, match="is a bundle already"):
        build(tiny_checkpoint, tmp_path / "b")


def test_verdicts_are_noted_beside_what_came_meanwhile(bundle: Path, tiny_checkpoint: Path) -> None:
    checked = Bundle.open(bundle)
    reserve(checked)
    add_file(bundle, "meanwhile.txt")
    note(checked, {"ort-cpu": {"result": "passed"}}, lambda *_: None)
    manifest = Bundle.open(bundle).manifest
    assert manifest.parity == {"ort-cpu": {"result": "passed"}}
    assert "meanwhile.txt" in manifest.files
    add_targets(bundle, tiny_checkpoint, ["ort-cpu"], sparsity="2:4")
    with pytest.raises(BuildError, match=r"ort-cpu of .* was built anew while it was checked"):
        note(checked, {"ort-cpu": {"result": "passed"}}, lambda *_: None)
    assert Bundle.open(bundle).manifest.parity == {}
