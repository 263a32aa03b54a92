"""What a dry run says, held to what a build then writes."""

import json
import shutil
from pathlib import Path

import pytest

from moevlm.export.build import build
from moevlm.export.dry_run import dry_run
from moevlm.runtime.core.errors import BuildError, CheckpointError, UnsupportedModelError
from tests.support.command_line import assert_refused, call
from tests.support.tiny import edit_json, edit_tensors

TARGETS = ("reference", "ort-cpu", "cpu:int4")


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Its config.json alone."""
    return Path(shutil.copy(tiny_checkpoint / "config.json", tmp_path))


def test_sizes_and_costs_are_those_of_the_build(copy: Path, tmp_path: Path) -> None:
    plan = dry_run(copy, TARGETS)
    built = build(copy, tmp_path / "b", TARGETS)
    assert plan.model == built.manifest.model
    assert plan.tensors > 20
    for target in plan.targets:
        engine = built.manifest.engines[target.name]
        assert target.engine is not None
        assert (target.engine.states, target.engine.cost) == (engine.states, engine.cost)
        data = [path for path in built.engine_files(target.name) if path.endswith(".data")]
        assert target.bytes == sum(built.manifest.files[path].size for path in data)


def test_config_alone_gives_the_sizes_of_its_checkpoint(copy: Path, config: Path) -> None:
    whole, bare = dry_run(copy, TARGETS), dry_run(config, TARGETS)
    assert (bare.tensors, bare.notes) == (0, ())
    assert bare.targets == whole.targets
    assert dry_run(config.parent, TARGETS) == bare


def test_what_a_checkpoint_lacks_is_said_before_the_build(copy: Path) -> None:
    lacking = ["the checkpoint has no chat_template.jinja: moevlm run needs it"]
    lacking.append("the checkpoint has no preprocessor_config.json: this bundle takes no images")
    assert not [note for note in dry_run(copy, ["cpu:int8"]).notes if note in lacking]
    (copy / "chat_template.jinja").unlink()
    (copy / "preprocessor_config.json").unlink()
    assert [note for note in dry_run(copy, ["cpu:int8"]).notes if note in lacking] == lacking


def test_gpu_targets_are_planned_on_a_machine_that_cannot_build_them(config: Path) -> None:
    rtx, trt = dry_run(config, ["rtx:sm89", "trt:sm90"], experts="int4").targets
    assert (rtx.name, rtx.elsewhere) == ("rtx:sm89:bf16-int4", "")
    assert trt.name == "trt:sm90:bf16-int4"
    assert "needs tensorrt " in trt.elsewhere
    assert rtx.bytes == trt.bytes > 0


def test_what_one_target_cannot_do_is_said_and_the_others_go_on(config: Path) -> None:
    edit_json(config, lambda c: c["text_config"].update(head_dim=2048, hidden_size=32))
    edit_json(config, lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[512, 256, 256]))
    reference, cpu, unknown = dry_run(config, ["reference", "cpu:int8", "cpu:int3"]).targets
    assert reference.engine is not None
    assert cpu.engine is None
    assert "text_config.head_dim = 2048" in cpu.refused
    assert unknown.refused.startswith('unknown target "cpu:int3"')


def test_option_without_effect_is_refused_and_counts_where_it_can(config: Path) -> None:
    with pytest.raises(BuildError, match="--experts has no effect on cpu:int8"):
        dry_run(config, ["cpu:int8"], experts="int4")
    cpu, rtx = dry_run(config, ["cpu:int8", "rtx:sm89"], experts="int4").targets
    assert cpu.refused == rtx.refused == ""


def test_what_a_build_refuses_a_dry_run_refuses(copy: Path, config: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop("model.language_model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.language_model\.norm\.weight"):
        dry_run(copy)
    edit_json(config, lambda c: c.update(model_type="gpt2"))
    with pytest.raises(UnsupportedModelError, match='model_type = "gpt2"'):
        dry_run(config)
    with pytest.raises(CheckpointError, match=r"no checkpoint and no config\.json at"):
        dry_run(copy.parent / "nowhere")


def test_command_shows_the_plan_and_leaves_nothing(config: Path) -> None:
    names = [word for name in ("cpu:int8", "cpu:int3", "rtx:sm89", "ort-cpu") for word in ("--target", name)]
    said = call("build", config, "--dry-run", *names, "--experts", "int4")
    assert said.status == 1  # one of those that were named cannot be built
    assert "no weights here" in said.out
    assert '\nrefused: unknown target "cpu:int3" (allowed: ' in said.out
    possible = "--target cpu:int8 --target rtx:sm89 --target ort-cpu --experts int4"
    assert said.out.splitlines()[-1] == f"next: moevlm build CHECKPOINT -o BUNDLE {possible}"
    assert [path.name for path in config.parent.iterdir()] == ["config.json"]
    assert call("build", config, "--dry-run", "--target", "cpu:int8").status == 0
    assert_refused(call("build", config, "--dry-run", "-o", "x"), "--dry-run takes a checkpoint or its config.json")
    assert_refused(call("build", config, "-o", "x"), f"moevlm build {config} --dry-run says what it would become")


def test_plan_of_every_backend_is_the_default(config: Path) -> None:
    said = call("build", config, "--dry-run")
    for name in ("reference", "ort-cpu:int4", "cpu:int4", "rtx:sm80,sm86,sm89,sm120,sm121:bf16", "trt:sm90:bf16"):
        assert f"\n{name} " in said.out or f"\nrefused: {name} " in said.out
    assert json.loads(config.read_text())["model_type"] in said.out
