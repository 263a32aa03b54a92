"""Quantized checkpoints through a build and parity, and what the bundle says of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from moevlm.export.build import add_targets, build
from moevlm.export.dry_run import dry_run
from moevlm.export.parity.run import check_parity
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import CheckpointError
from tests.support.command_line import assert_refused, call
from tests.support.published import FORMATS, floats
from tests.support.tiny import edit_json

STORED_AS = {"nvfp4": 32, "float32": 58}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen3_vl_moe in NVFP4, its experts one by one: transformers reads neither."""
    root = tmp_path_factory.mktemp("nvfp4")
    source = floats("qwen3_vl_moe", root / "floats")
    return FORMATS["nvfp4-hf-quant-config"].publish(source, root / "checkpoint", root / "plain")


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, notes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundle") / "a.moevlm"
    return build(checkpoint, path, ["reference", "cpu:int4"], note=notes.append)


def test_manifest_and_inspect_say_how_the_weights_were_held(bundle: Bundle, notes: list[str]) -> None:
    assert bundle.manifest.stored_as == STORED_AS
    assert any(note.startswith("the checkpoint is quantized: 32 tensors nvfp4, 58 float32") for note in notes)
    assert re.search(r"checkpoint +32 tensors nvfp4, 58 float32", call("inspect", bundle.directory).out)


def test_engines_pass_parity(bundle: Bundle, checkpoint: Path) -> None:
    report = check_parity(bundle.directory, checkpoint, quick=True)
    assert report.passed
    assert {check.step.split()[-1] for check in report.checks} >= {"reference", "cpu:int4"}


def test_config_of_modelopt_is_one_of_the_files_that_have_to_be_the_same(
    bundle: Bundle, checkpoint: Path, tmp_path: Path
) -> None:
    assert set(bundle.manifest.source) == {"config.json", "hf_quant_config.json", "model.safetensors"}
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    edit_json(changed / "hf_quant_config.json", lambda config: config["quantization"].update(exclude_modules=["lm"]))
    copy = Path(shutil.copytree(bundle.directory, tmp_path / "copy"))
    with pytest.raises(
        CheckpointError, match=r"hf_quant_config.json is not the file that the bundle was exported from"
    ):
        add_targets(copy, changed, ["ort-cpu"])


@pytest.mark.parametrize("method", ["bitsandbytes", "quark", "gguf", None])
def test_method_that_is_not_read_is_one_line_on_the_command_line(
    method: str | None, checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    edit_json(other / "config.json", lambda config: config.update(quantization_config={"quant_method": method}))
    for options in (["--dry-run"], ["-o", tmp_path / "out.moevlm"]):
        assert_refused(call("build", other, *options), "quantization_config.quant_method = ", "(supported: fp8, ")
    assert not (tmp_path / "out.moevlm").exists()


def test_dry_run_says_what_a_checkpoint_and_what_a_config_alone_hold(checkpoint: Path, tmp_path: Path) -> None:
    assert "the checkpoint is quantized: 32 tensors nvfp4, 58 float32" in dry_run(checkpoint, ["cpu:int8"]).notes
    for name in ("config.json", "hf_quant_config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    told = [note for note in dry_run(tmp_path, ["cpu:int8"]).notes if note.startswith("the checkpoint is quantized")]
    assert told == [
        "the checkpoint is quantized: modelopt; sizes are those of one in floats: "
        "a dry run of the whole checkpoint looks at its tensors"
    ]
