"""Parity of TensorRT engines: on the strict fake of a GPU, and on the graphs that TensorRT is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from safetensors.numpy import load_file, save_file

from moevlm.export.parity import check_parity
from moevlm.export.parity_cases import random_cases
from moevlm.export.parity_report import ParityReport
from moevlm.runtime.bundle import Bundle
from moevlm.runtime.errors import BundleError, RequestError
from tests.bundles import edit_manifest, rehash
from tests.command_line import assert_refused, call
from tests.fakes.gpu import EXPERTS, TARGET, fake_gpu, gpu_bundle

OUTPUTS = ["image features", "deepstack features", "prefill logits", "chunked prefill logits", "decode logits"]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return gpu_bundle(tiny_bundle, tmp_path)


def of_engine(report: ParityReport) -> dict[str, bool]:
    return {check.quantity: check.passed for check in report.checks if check.step == TARGET}


def test_a_right_engine_passes_within_what_it_was_built_for(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with fake_gpu(tmp_path) as gpu:
        report = check_parity(bundle, tiny_checkpoint, ["rtx"], seed=3)
        assert not gpu.held()
    assert report.passed
    found = of_engine(report)
    assert list(found)[:6] == [*OUTPUTS, "each prompt alone"]
    assert list(found)[6].endswith(" greedy tokens that differ")
    assert (report.plans, report.left_out) == ((TARGET,), "")
    noted = Bundle.open(bundle).manifest.parity
    assert noted[TARGET]["result"] == "passed"
    assert set(noted) == {TARGET}
    assert set(noted[TARGET]["checks"]) == set(found)
    (shown,) = [line for line in call("inspect", bundle).out.splitlines() if TARGET in line and "passed" in line]
    assert "float32" in shown


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
        (damage("decoder", "norm.weight"), "prefill logits"),
        (damage("vision", "blocks.0.mlp.up.weight"), "image features"),
    ],
)
def test_a_wrong_engine_fails_and_the_others_do_not(
    change: Callable[[Path], None], quantity: str, bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    change(bundle)
    with fake_gpu(tmp_path):
        done = call("parity", bundle, "--checkpoint", tiny_checkpoint, "--target", TARGET, "--target", "ort-cpu")
    assert done.status == 1
    assert f"parity: failed, first at {TARGET}: {quantity}" in done.out
    noted = Bundle.open(bundle).manifest.parity
    assert (noted[TARGET]["result"], noted["ort-cpu"]["result"]) == ("failed", "passed")


def test_by_default_all_that_run_here_are_checked_and_the_others_named(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with fake_gpu(tmp_path):
        assert list(steps(bundle, tiny_checkpoint)) == ["canonical PyTorch", "reference", "ort-cpu", TARGET]
    with fake_gpu(tmp_path, sm=(7, 5)):
        done = call("parity", bundle, "--checkpoint", tiny_checkpoint)
    assert done.status == 0, done.err
    reason = "needs compute capability 8.6 or 8.9"
    assert f"left out: {TARGET} ({reason}); this machine has Fake GPU, compute capability 7.5\n" in done.out
    assert set(Bundle.open(bundle).manifest.parity) == {"reference", "ort-cpu", TARGET}


def steps(bundle: Path, checkpoint: Path) -> dict[str, None]:
    done = call("parity", bundle, "--checkpoint", checkpoint, "--json", "-")
    assert done.status == 0, done.err
    return dict.fromkeys(check["step"] for check in json.loads(done.out)["checks"])


def test_without_its_gpu_an_engine_is_refused_by_name_and_where_there_is_no_other(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with fake_gpu(tmp_path, devices=0):
        named = call("parity", bundle, "--checkpoint", tiny_checkpoint, "--target", TARGET)
        assert_refused(named, f"it has {TARGET} (needs compute capability 8.6 or 8.9)", "no NVIDIA GPU")
        edit_manifest(bundle, lambda manifest: [manifest["engines"].pop(name) for name in ("reference", "ort-cpu")])
        shutil.rmtree(bundle / "engines/ort-cpu")
        with pytest.raises(BundleError, match="no engine for this machine in"):
            check_parity(bundle, tiny_checkpoint)


def test_a_plan_shows_nothing_of_its_inside_and_the_table_says_so(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with fake_gpu(tmp_path):
        done = call("parity", bundle, "--checkpoint", tiny_checkpoint, "--target", TARGET)
    lines = done.out.splitlines()
    (note,) = [line for line in lines if "not visible in a plan" in line]
    assert "routing, hidden states" in note
    assert lines.index(note) == next(i for i, line in enumerate(lines) if TARGET in line) + 1


def test_few_decode_steps_where_the_cache_has_room_for_no_more(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    longest = max(len(case.prompt.ids) for case in cases(bundle, 0))
    edit_manifest(bundle, lambda manifest: manifest["engines"][TARGET]["tensorrt"].update(capacity=longest))
    with (
        fake_gpu(tmp_path),
        pytest.raises(RequestError, match=f"needs a cache of {longest + 1} tokens, the engine has"),
    ):
        check_parity(bundle, tiny_checkpoint, [TARGET])


def cases(bundle: Path, seed: int) -> list:
    return random_cases(Bundle.open(bundle).manifest.model, {}, seed)
