"""Parity of TensorRT engines: on the strict fake of a GPU, and on the graphs that TensorRT is given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.numpy import load_file, save_file

from moevlm.export.formats.encoded import as_stored
from moevlm.export.formats.registry import weight_format
from moevlm.export.graph.weights import Constant, read
from moevlm.export.parity.report import table_of
from moevlm.export.parity.run import check_parity
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError
from tests.support.bundles import edit_manifest, rehash
from tests.support.command_line import assert_refused, call
from tests.support.fakes.gpu import EXPERTS, TARGET, fake_gpu, gpu_bundle

OUTPUTS = ["image features", "deepstack features", "prefill logits", "chunked prefill logits", "decode logits"]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return gpu_bundle(tiny_bundle, tmp_path)


def test_a_right_engine_passes_within_what_it_was_built_for(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with fake_gpu(tmp_path) as gpu:
        done = call("parity", bundle, "--checkpoint", tiny_checkpoint, "--target", "rtx", "--seed", "3")
        assert not gpu.held()
    assert done.status == 0, done.err
    assert "left out" not in done.out
    lines = done.out.splitlines()
    (note,) = [line for line in lines if "not visible in a plan" in line]
    assert "routing, hidden states" in note
    assert TARGET in lines[lines.index(note) - 1]
    noted = Bundle.open(bundle).manifest.parity
    assert set(noted) == {TARGET}
    assert (noted[TARGET]["result"], noted[TARGET]["seed"]) == ("passed", 3)
    assert list(noted[TARGET]["checks"])[:6] == [*OUTPUTS, "each prompt alone"]
    assert list(noted[TARGET]["checks"])[6] == "first choices that differ"
    (shown,) = [line for line in call("inspect", bundle).out.splitlines() if TARGET in line and "passed" in line]
    assert "float32" in shown


def test_rounded_experts_are_held_to_the_same_weights_and_their_cost_is_shown(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    edit_manifest(bundle, lambda manifest: manifest["engines"][TARGET].update(dtype="int8", group_size=32))
    with fake_gpu(tmp_path):
        exact = check_parity(bundle, tiny_checkpoint, [TARGET])
        tensors = load_file(bundle / EXPERTS)
        for name, array in tensors.items():
            tensors[name] = read(as_stored(Constant(array), weight_format("int8", 32)))
        save_file(tensors, bundle / EXPERTS)
        rehash(bundle, EXPERTS)
        rounded = check_parity(bundle, tiny_checkpoint, [TARGET])
    assert not exact.passed
    assert rounded.passed, table_of(rounded)
    assert rounded.rounded == (TARGET,)
    cost, usual = [check for check in rounded.checks if check.step == TARGET][:2]
    assert cost.quantity == "rounded experts KL" and cost.note.startswith("int8 against unrounded")
    assert 0 < usual.value < usual.limit < cost.limit
    lines = table_of(rounded).splitlines()
    assert "rounded experts: against canonical PyTorch on the same weights" in next(x for x in lines if TARGET in x)


def swap_experts(bundle: Path) -> None:
    tensors = load_file(bundle / EXPERTS)
    name = next(name for name in tensors if name.endswith("down"))
    tensors[name] = tensors[name][::-1].copy()
    save_file(tensors, bundle / EXPERTS)
    rehash(bundle, EXPERTS)


def damage(graph: str, weight: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        path = bundle.parent / f"graphs/{graph}.onnx"
        model = onnx.load(path)
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == weight]
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[array.size // 3] += 1
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, weight))
        onnx.save(model, path)

    return change


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        (swap_experts, "prefill logits"),
        (damage("vision", "blocks.0.mlp.up.weight"), "image features"),
    ],
)
def test_by_default_all_that_run_here_are_checked_and_the_wrong_one_fails(
    change: Callable[[Path], None], quantity: str, bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    change(bundle)
    with fake_gpu(tmp_path):
        report = check_parity(bundle, tiny_checkpoint)
    assert list(dict.fromkeys(check.step for check in report.checks)) == [
        *("requests", "canonical PyTorch", "reference", "ort-cpu"),
        TARGET,
    ]
    first = next(check for check in report.checks if not check.passed)
    assert (first.step, first.quantity) == (TARGET, quantity)
    results = {name: entry["result"] for name, entry in Bundle.open(bundle).manifest.parity.items()}
    assert results == {"reference": "passed", "ort-cpu": "passed", TARGET: "failed"}


def test_by_default_what_does_not_run_here_is_left_out_and_named(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with fake_gpu(tmp_path, sm=(7, 5)):
        done = call("parity", bundle, "--checkpoint", tiny_checkpoint)
    assert done.status == 0, done.err
    reason = "needs sm86 (RTX 30, A10, A40, RTX A6000) or sm89 (RTX 40, L4, L40S, RTX 6000 Ada)"
    assert f"left out: {TARGET} ({reason}); this machine has Fake GPU, sm75\n" in done.out
    assert set(Bundle.open(bundle).manifest.parity) == {"reference", "ort-cpu"}


def test_without_its_gpu_an_engine_is_refused_by_name_and_where_there_is_no_other(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with fake_gpu(tmp_path, devices=0):
        named = call("parity", bundle, "--checkpoint", tiny_checkpoint, "--target", TARGET)
        assert_refused(
            named,
            f"it has {TARGET} (needs sm86 (RTX 30, A10, A40, RTX A6000) or sm89 (RTX 40, L4, L40S, RTX 6000 Ada))",
            "no NVIDIA GPU",
        )
        edit_manifest(bundle, lambda manifest: [manifest["engines"].pop(name) for name in ("reference", "ort-cpu")])
        shutil.rmtree(bundle / "engines/ort-cpu")
        with pytest.raises(BundleError, match="no engine for this machine in"):
            check_parity(bundle, tiny_checkpoint)


def test_prompts_without_room_are_refused_before_any_work(bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def shrink(manifest: dict[str, Any]) -> None:
        engine = manifest["engines"][TARGET]
        engine["page_size"], engine["tensorrt"]["max_pages"] = 16, 2

    edit_manifest(bundle, shrink)
    with fake_gpu(tmp_path) as gpu:
        refused = call("parity", bundle, "--checkpoint", tiny_checkpoint, "--target", TARGET)
        assert_refused(refused, "parity needs a context of", "tokens, the engine has 16")
        assert not gpu.trt.state["deserialized"]
