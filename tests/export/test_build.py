"""Checkpoint to bundle: what is written, what stays, and what is left after a failure."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from moevlm.export.build import add_targets, build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.run import check_parity
from moevlm.export.passes.base import CONTRIB
from moevlm.plugins.ops.spec import DOMAIN
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BuildError, CheckpointError, MoevlmError, UnsupportedModelError
from moevlm.runtime.core.manifest import LayerMetadata
from moevlm.runtime.core.states import PagedKV
from tests.support.command_line import assert_refused, call
from tests.support.families.base import END, STOP
from tests.support.tiny import edit_json, edit_tensors

SIDE_FILES = {"tokenizer.json", "chat_template.jinja", "preprocessor.json", "video_preprocessor.json"}
GRAPHS = {"graphs/vision.onnx", "graphs/decoder.onnx"}
REFERENCE = GRAPHS | {f"{path}.data" for path in GRAPHS}
ORT_CPU = {path.replace("graphs/", "engines/ort-cpu/") for path in REFERENCE}


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own with both engines."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.moevlm"))


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def assert_nothing_left(directory: Path, *expected: str) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(expected)


def test_export_writes_the_graphs_without_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(tiny_checkpoint, tmp_path / "b")
    bundle.verify()
    assert bundle.directory == tmp_path / "b"
    assert set(contents(tmp_path / "b")) == GRAPHS | SIDE_FILES | {"manifest.json"}
    assert bundle.manifest.engines == {}
    weights = (tiny_checkpoint / "model.safetensors").stat().st_size
    for path in GRAPHS:
        assert (tmp_path / "b" / path).stat().st_size < weights / 4
        graph = onnx.load(tmp_path / "b" / path, load_external_data=False)
        assert {f.domain for f in graph.functions} == {DOMAIN}
        assert all(t.external_data for t in graph.graph.initializer if np.prod(t.dims) > 2000)
    assert_nothing_left(tmp_path, "b")


@pytest.mark.parametrize(
    ("target", "files"), [("reference", REFERENCE), ("ort-cpu", GRAPHS | ORT_CPU)], ids=["reference", "ort-cpu"]
)
def test_each_target_writes_its_engine_and_the_canonical_graphs(
    target: str, files: set[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = build(tiny_checkpoint, tmp_path / "b", [target, target])
    bundle.verify()
    assert set(contents(tmp_path / "b")) == files | SIDE_FILES | {"manifest.json"}
    assert set(bundle.manifest.engines) == {target}
    assert bundle.manifest.parity == {}


def test_manifest_says_what_the_runtime_needs(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    model = manifest.model
    words = {"mixer": "GQA with q/k norms", "routing": "softmax, renormalised"}
    layer = LayerMetadata(heads=4, kv_heads=2, key_dim=16, value_dim=16, experts=8, top_k=2, **words)
    assert (model.model_type, model.layers, model.context) == ("qwen3_vl_moe", (layer, layer), 512)
    states = tuple(PagedKV(layer=i, kv_heads=2, key_dim=16, value_dim=16) for i in range(2))
    assert all(engine.states == states for engine in manifest.engines.values())
    assert (model.vision.position_grid, model.vision.deepstack, model.vision.merge_size) == (5, 2, 2)
    assert model.eos_token_ids == (STOP, END)
    assert set(manifest.source) == {"config.json", "model.safetensors"}
    for name, metadata in manifest.source.items():
        assert metadata.size == (tiny_checkpoint / name).stat().st_size
    assert {"moevlm", "torch", "onnx", "onnx-ir"} <= set(manifest.tools)


def test_side_files_are_those_of_the_checkpoint(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tiny_bundle / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    theirs = json.loads((tiny_checkpoint / "preprocessor_config.json").read_text())
    assert json.loads((tiny_bundle / "preprocessor.json").read_text()) == theirs


def test_image_processor_is_found_in_the_file_of_a_whole_processor(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    alone = json.loads((checkpoint / "preprocessor_config.json").read_text())
    (checkpoint / "preprocessor_config.json").unlink()
    (checkpoint / "processor_config.json").write_text(json.dumps({"image_processor": alone, "processor_class": "P"}))
    build(checkpoint, tmp_path / "b")
    ours, theirs = (json.loads((b / "preprocessor.json").read_text()) for b in (tmp_path / "b", tiny_bundle))
    assert ours == theirs


def test_targets_may_come_from_any_iterable(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(tiny_checkpoint, tmp_path / "b", (name for name in ["ort-cpu"]))
    assert set(bundle.manifest.engines) == {"ort-cpu"}


def test_expert_layout_of_a_bundle_holds_for_targets_added_later(
    save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(hub=True)
    build(checkpoint, tmp_path / "b", ["reference"], expert_layout="in_out")
    bundle = add_targets(tmp_path / "b", checkpoint, ["ort-cpu"])
    assert bundle.manifest.expert_layout == "in_out"
    with pytest.raises(CheckpointError, match="shape"):
        build(checkpoint, tmp_path / "other", ["reference"], expert_layout="out_in")


def test_fields_ignored_and_tensors_left_out_are_on_record_and_hold_for_targets_added_later(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    edit_json(checkpoint / "config.json", lambda config: config["text_config"].update(unheard_of=3))
    extra = {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    edit_tensors(checkpoint, lambda tensors: tensors.update(extra))
    with pytest.raises(UnsupportedModelError, match="unheard_of = 3"):
        build(checkpoint, tmp_path / "b")
    name = "text_config.unheard_of"
    ignored = ("--ignore-config", name, "--ignore-config", name)
    result = call("build", checkpoint, "-o", tmp_path / "b", "--target", "ort-cpu", *ignored)
    assert "note: left out 1 tensor rotary_emb.inv_freq: they follow from config.json" in result.out
    added = call("build", tmp_path / "b", "--checkpoint", checkpoint, "--target", "reference", "--ignore-config", name)
    assert_refused(added, "--ignore-config was decided when the bundle was made")
    manifest = add_targets(tmp_path / "b", checkpoint, ["reference"]).manifest
    assert manifest.ignored_config == (name,)
    assert manifest.left_out == {"rotary_emb.inv_freq": 1}
    shown = call("inspect", tmp_path / "b").out
    assert name in shown
    assert "1 tensor rotary_emb.inv_freq" in shown


def test_checkpoint_without_side_files_still_builds(save_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_checkpoint(text={"eos_token_id": 9})
    (checkpoint / "generation_config.json").unlink()
    bundle = build(checkpoint, tmp_path / "b")
    assert set(bundle.manifest.files) == GRAPHS
    assert bundle.manifest.model.eos_token_ids == (9,)


def test_generation_config_says_what_ends_a_turn(save_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_checkpoint(text={"eos_token_id": 9})
    for given, expected in (([4, 5], (4, 5)), (6, (6,)), (None, (9,))):
        (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        assert build(checkpoint, tmp_path / "b", replace=True).manifest.model.eos_token_ids == expected


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def unpacked(lowered: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Joined projections, a+b+c, as the weights that they were."""
    result = dict(lowered)
    for joined in [name for name in lowered if "+" in name]:
        names = joined.split("+")
        ends = np.cumsum([shapes[name][0] for name in names])
        result |= dict(zip(names, np.split(result.pop(joined), ends[:-1]), strict=True))
    return result


@pytest.mark.parametrize("options", [{}, {"model_type": "glm4v_moe", "dtype": "bfloat16"}], ids=["qwen", "glm, bf16"])
def test_engines_hold_the_values_of_the_checkpoint(
    options: dict[str, str], save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(**options)
    bundle = build(checkpoint, tmp_path / "b", ["reference", "ort-cpu"]).directory
    with Checkpoint.open(checkpoint) as source:
        model = CanonicalModel.of(source)
    for graph, weights in (("vision", model.vision_weights), ("decoder", model.decoder_weights)):
        reference = initializers(bundle / f"graphs/{graph}.onnx")
        shapes = {name: weight.shape for name, weight in weights.items()}
        lowered = unpacked(initializers(bundle / f"engines/ort-cpu/{graph}.onnx"), shapes)
        for name, weight in weights.items():
            expected = read(weight)
            np.testing.assert_array_equal(reference[name], expected, err_msg=name)
            if name.endswith("gate_up"):  # the kernel wants gate and up rows in turn
                gate, up = np.split(expected, 2, axis=1)
                np.testing.assert_array_equal(lowered[f"{name}.interleaved"][:, 0::2], gate)
                np.testing.assert_array_equal(lowered[f"{name}.interleaved"][:, 1::2], up)
                assert name not in lowered
            else:
                np.testing.assert_array_equal(lowered[name], expected, err_msg=name)


def test_lowered_engine_runs_the_kernels_that_it_is_for(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "engines/ort-cpu/decoder.onnx", load_external_data=False)
    ops = [node.op_type for node in graph.graph.node if node.domain == CONTRIB]
    assert sorted(ops) == ["GroupQueryAttention"] * 2 + ["MoE"] * 2 + ["SkipSimplifiedLayerNormalization"] * 3
    assert not [node for node in graph.graph.node if node.domain == DOMAIN]
    assert not graph.functions


def test_target_added_to_exported_graphs_equals_a_build_at_once(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    build(tiny_checkpoint, tmp_path / "b")
    before = contents(tmp_path / "b")
    bundle = add_targets(tmp_path / "b", tiny_checkpoint, ["ort-cpu"])
    bundle.verify()
    after, at_once = contents(tmp_path / "b"), contents(tiny_bundle)
    assert set(after) == set(before) | ORT_CPU
    assert {name: after[name] for name in ORT_CPU} == {name: at_once[name] for name in ORT_CPU}
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    add_targets(tmp_path / "b", tiny_checkpoint, ["reference"]).verify()
    complete = contents(tmp_path / "b")
    assert complete.pop("manifest.json")
    assert complete == {name: content for name, content in at_once.items() if name != "manifest.json"}
    assert_nothing_left(tmp_path, "b")


def test_target_built_again_loses_its_parity_and_the_others_keep_theirs(copy: Path, tiny_checkpoint: Path) -> None:
    check_parity(copy, tiny_checkpoint)
    before, noted = contents(copy), Bundle.open(copy).manifest.parity
    assert set(noted) == {"reference", "ort-cpu"}
    bundle = add_targets(copy, tiny_checkpoint, ["ort-cpu"])
    bundle.verify()
    assert bundle.manifest.parity == {"reference": noted["reference"]}
    assert set(bundle.manifest.engines) == {"reference", "ort-cpu"}
    after = contents(copy)
    del before["manifest.json"], after["manifest.json"]
    assert after == before  # the same checkpoint gives the same bytes


def test_another_checkpoint_is_refused_and_the_bundle_stays(copy: Path, save_checkpoint: Callable[..., Path]) -> None:
    before = contents(copy)
    with pytest.raises(CheckpointError, match="not the file that the bundle was exported from"):
        add_targets(copy, save_checkpoint(seed=99), ["ort-cpu"])
    with pytest.raises(CheckpointError, match="not the checkpoint that the bundle was exported from"):
        add_targets(copy, save_checkpoint(shard_size="20KB"), ["ort-cpu"])
    assert contents(copy) == before


@pytest.mark.parametrize("names", [["ort-cuda"], ["ort-cpu", "tensorrt"], ["ort-cpu:int3"]])
def test_unknown_target_lists_the_allowed_before_anything_is_done(
    names: list[str], copy: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    before = contents(copy)
    message = rf'unknown target "{names[-1]}" \(allowed: reference, ort-cpu'
    with pytest.raises(BuildError, match=message):
        build(tiny_checkpoint, tmp_path / "b", names)
    with pytest.raises(BuildError, match=message):
        add_targets(copy, tiny_checkpoint, names)
    with pytest.raises(BuildError, match=r"name a target to add \(allowed: reference, ort-cpu"):
        add_targets(copy, tiny_checkpoint, [])
    assert contents(copy) == before
    assert_nothing_left(tmp_path, copy.name)


@pytest.mark.parametrize("kind", ["directory", "file", "empty directory"])
def test_destination_that_is_no_bundle_is_refused_and_kept(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "work"
    if kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
    if kind == "directory":
        (place / "thesis.txt").write_text("mine")
    with pytest.raises(BuildError, match="exists and is not a bundle"):
        build(tiny_checkpoint, place, ["ort-cpu"])
    assert_nothing_left(tmp_path, "work")
    assert kind != "file" or place.read_text() == "mine"
    assert kind != "directory" or (place / "thesis.txt").read_text() == "mine"


PHASES = ["tracing the model", "writing ort-cpu vision", "writing ort-cpu decoder", "hashing the checkpoint"]


@pytest.mark.parametrize("phase", PHASES)
def test_interrupt_leaves_nothing_new_and_everything_old(
    phase: str, copy: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def progress(what: str, _done: int, _total: int) -> None:
        if what == phase:
            raise KeyboardInterrupt

    before = contents(copy)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_checkpoint, tmp_path / "b", ["ort-cpu"], progress=progress)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_checkpoint, copy, ["ort-cpu"], replace=True, progress=progress)
    with pytest.raises(KeyboardInterrupt):
        add_targets(copy, tiny_checkpoint, ["ort-cpu"], progress=progress)
    assert contents(copy) == before
    assert_nothing_left(tmp_path, copy.name)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: edit_json(d / "config.json", lambda c: c.update(model_type="llama")), UnsupportedModelError),
        (lambda d: (d / "model.safetensors").unlink(), CheckpointError),
        (lambda d: (d / "generation_config.json").write_text("["), CheckpointError),
        (lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "x"}'), CheckpointError),
        (lambda d: (d / "chat_template.jinja").write_bytes(b"\xff"), CheckpointError),
    ],
    ids=["model_type", "no weights", "generation_config", "eos_token_id", "chat template"],
)
def test_checkpoint_that_cannot_be_read_leaves_nothing(
    change: Callable[[Path], object], error: type[MoevlmError], save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_checkpoint()
    change(checkpoint)
    with pytest.raises(error) as raised:
        build(checkpoint, tmp_path / "b")
    assert "\n" not in str(raised.value)
    assert_nothing_left(tmp_path, checkpoint.name)


def test_progress_counts_the_bytes_of_every_file_to_the_end(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    build(tiny_checkpoint, tmp_path / "b", ["ort-cpu"], progress=lambda what, *at: seen.setdefault(what, []).append(at))
    assert set(PHASES) <= set(seen)
    for graph in ("vision", "decoder"):
        counts = seen[f"writing ort-cpu {graph}"]
        size = (tmp_path / "b" / f"engines/ort-cpu/{graph}.onnx.data").stat().st_size
        assert counts == sorted(counts)
        assert counts[-1] == (size, size)


@pytest.mark.parametrize(
    ("target", "tensor", "value", "message"),
    [
        ("cpu:int4", "q_proj.weight", np.nan, r"tensor .*layers\.0\.self_attn\.q_proj\.weight is not finite"),
        (
            "cpu:int8",
            "q_proj.weight",
            1e9,
            r"initializer layers\.0\..*int8: the scale of a group is -8\.06e\+06 .*float16",
        ),
        (
            "cpu:int8",
            "experts.down_proj",
            1e9,
            r"initializer layers\.0\..*down.*int8: the scale of a group is -8\.06e\+06 .*float16",
        ),
    ],
)
def test_weight_that_cannot_be_written_is_named_and_nothing_is_left(
    target: str, tensor: str, value: float, message: str, save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_checkpoint()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(t for name, t in tensors.items() if "layers.0." in name and name.endswith(tensor)).view(-1)[7] = value

    edit_tensors(checkpoint, spoil)
    with pytest.raises(MoevlmError, match=message) as raised:
        build(checkpoint, tmp_path / "b", [target])
    assert "\n" not in str(raised.value)
    assert_nothing_left(tmp_path, checkpoint.name)
