"""A file of results never replaces what a command reads; what is missing is told before the work."""

import os
import sys
from pathlib import Path

import click
import pytest

from moevlm.runtime.cli.option_types import OutputFile
from moevlm.runtime.core.installation import install_command
from tests.support.command_line import call


def untouched(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("inside", ["manifest.json", "new.json", "graphs/../manifest.json", "engines/report.json"])
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_results_are_not_written_into_the_bundle(tiny_bundle: Path, inside: str, option: str) -> None:
    before = untouched(tiny_bundle)
    result = call("bench", "latency", tiny_bundle, option, tiny_bundle / inside)
    assert result.status == 2
    (line,) = result.errors
    assert f"lies in {tiny_bundle}, which this command reads: choose another place" in line
    assert untouched(tiny_bundle) == before


def test_results_are_not_written_through_a_link_into_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").symlink_to(tiny_bundle / "manifest.json")
    before = untouched(tiny_bundle)
    result = call("bench", "latency", tiny_bundle, "--json", tmp_path / "report.json")
    assert result.status == 2
    assert untouched(tiny_bundle) == before


def test_standard_output_and_existing_files_need_no_writable_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    existing = tmp_path / "out.json"
    existing.touch()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) == existing)  # as root every folder is writable
    for place in ("-", str(existing)):
        assert str(OutputFile().convert(place, None, None)) == place
    with pytest.raises(click.BadParameter, match="not a directory that can be written to"):
        OutputFile().convert(str(tmp_path / "new.json"), None, None)


def test_a_link_to_itself_is_no_place_for_results(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    result = call("bench", "latency", tmp_path / "loop", "--json", tmp_path / "loop")
    assert (result.status, len(result.errors)) == (2, 1)
    assert "this command reads: choose another place" in result.errors[0]


def test_parity_writes_neither_into_the_bundle_nor_into_the_checkpoint(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    for place in (tiny_bundle / "manifest.json", tiny_checkpoint / "config.json"):
        before = place.read_bytes()
        result = call("parity", tiny_bundle, "--checkpoint", tiny_checkpoint, "--json", place)
        assert result.status == 2
        assert "choose another place" in result.errors[0]
        assert place.read_bytes() == before


def test_one_place_is_not_written_twice(tiny_bundle: Path, tmp_path: Path) -> None:
    places = ("--json", tmp_path / "out", "--plot", tmp_path / "." / "out")
    result = call("bench", "latency", tiny_bundle, *places)
    assert result.status == 2
    assert "would be written twice" in result.errors[0]


def test_parity_misses_a_package_before_transformers_runs(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moevlm.export.parity.run  # noqa: F401 - what follows is about what engines need, not about what parity does

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = call("parity", tiny_bundle, "--checkpoint", tiny_checkpoint)
    assert result.status == 2
    assert result.err.splitlines() == [f"error: this engine needs onnxruntime ({install_command('cpu')})"]
