"""What parity says before it starts, and what --quick leaves out."""

from pathlib import Path

import pytest

from moevlm.export.build import build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.model import CanonicalModel
from moevlm.export.parity import run as parity
from moevlm.export.parity.cases import random_cases
from moevlm.export.parity.needs import Needs
from moevlm.export.parity.report import table_of
from moevlm.export.parity.run import check_parity
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import RequestError
from tests.support.bundles import copy_bundle
from tests.support.tiny import TinyCheckpoint


def needs(layers: int, targets: list[str], folder: Path) -> Needs:
    checkpoint = TinyCheckpoint(text={"num_hidden_layers": layers, "hidden_size": 64}, vision={"out_hidden_size": 64})
    path = checkpoint.save(folder / f"{layers}")
    bundle = build(path, folder / f"{layers}.moevlm", targets)
    with Checkpoint.open(path) as source:
        cases = random_cases(bundle.manifest.model, source.config, 0)
        return Needs.of(CanonicalModel.of(source), cases, bundle, targets)


def test_memory_does_not_grow_with_the_number_of_layers_but_what_is_read_does(tmp_path: Path) -> None:
    few, many = (needs(layers, ["ort-cpu"], tmp_path) for layers in (2, 6))
    assert many.memory == few.memory > few.largest > 0
    assert many.largest == few.largest
    assert many.read > 2 * few.read
    assert many.engines > 2 * few.engines
    assert many.seconds > few.seconds


def test_too_little_memory_is_refused_by_name_before_any_work(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(parity, "available_memory", lambda: 90_000_000)
    with pytest.raises(RequestError, match=r"needs about \d+\.\d MB of memory, 90.0 MB are available \(a layer"):
        check_parity(tiny_bundle, tiny_checkpoint, progress=lambda what, *_: said.append(what))
    assert said[-1].startswith("parity needs about ")
    assert not any("running" in what for what in said)


def test_quick_look_checks_every_step_on_less_and_notes_no_verdict(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = copy_bundle(tiny_bundle, tmp_path)
    before = (copy / "manifest.json").read_bytes()
    report = check_parity(copy, tiny_checkpoint, ["ort-cpu"], quick=True)
    assert report.passed and report.quick
    assert report.prompts == 2
    assert list(dict.fromkeys(check.step for check in report.checks)) == ["requests", "canonical PyTorch", "ort-cpu"]
    assert (copy / "manifest.json").read_bytes() == before
    assert not Bundle.open(copy).manifest.parity
    assert "left out: several images in a prompt, most decode steps" in table_of(report)
