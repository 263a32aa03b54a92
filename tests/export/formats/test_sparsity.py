"""2:4 pruning: the rule by definition, in slices, and in engines read back from disk."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moevlm.export.backends.tensorrt import worker
from moevlm.export.backends.tensorrt.plan_builder import Built, Job
from moevlm.export.build import add_targets, build
from moevlm.export.formats.encoded import pruned
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.sparsity import prune
from moevlm.export.graph import weights
from moevlm.export.graph.weights import Constant, read
from moevlm.export.parity.report import table_of
from moevlm.export.parity.run import check_parity
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BuildError
from tests.support.bundles import copy_bundle, edit_manifest
from tests.support.checkpoints import families
from tests.support.command_line import assert_refused, call
from tests.support.tiny import TinyCheckpoint

# Small whole numbers: ties, zeros and both signs are common.
matrices = st.tuples(st.integers(1, 6), st.integers(1, 9)).flatmap(
    lambda size: arrays(np.float32, (size[0], 4 * size[1]), elements=st.integers(-3, 3).map(np.float32))
)
GATES = ("attention.a.", "attention.b.", "attention.conv", "shared_gate")  # of states and of shared experts
KEPT = ("embedding", "head", "router", *GATES)  # and what is no matrix: norms, biases, routed experts


@given(matrices)
def test_two_smallest_of_every_four_are_zero_and_the_rest_is_untouched(rows: np.ndarray) -> None:
    result = prune(rows)
    assert (result.shape, result.dtype) == (rows.shape, rows.dtype)
    for before, after in zip(rows.reshape(-1, 4), result.reshape(-1, 4), strict=True):
        first, second = sorted(range(4), key=lambda i: (-abs(before[i]), i))[:2]
        expected = np.zeros(4, np.float32)
        expected[[first, second]] = before[[first, second]]
        assert after.tobytes() == expected.tobytes()


@given(matrices)
def test_pruning_again_changes_nothing(rows: np.ndarray) -> None:
    assert prune(prune(rows)).tobytes() == prune(rows).tobytes()


@given(matrices, st.data())
def test_slices_are_those_of_the_whole(rows: np.ndarray, data: st.DataObject) -> None:
    weight = pruned(Constant(rows))
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    assert weight.rows(start, stop).tobytes() == prune(rows)[start:stop].tobytes()
    assert read(weight).tobytes() == prune(rows).tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zero_when_quantized(bits: int) -> None:
    rows = prune(np.random.default_rng().standard_normal((32, 128)).astype(np.float32))
    form = IntFormat(bits, 32)
    back = form.decode(*form.encode(rows))
    assert not back[rows == 0].any()


def initializers(bundle: Path, graph: str) -> dict[str, np.ndarray]:
    path = bundle / f"engines/ort-cpu/{graph}.onnx"
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@families
def test_engine_is_two_of_four_where_layers_are_dense_and_as_given_elsewhere(
    model_type: str, save_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SLICE_BYTES", 512)
    # A shared expert 22 wide: its way down has a width that 4 does not divide.
    checkpoint = save_checkpoint(model_type=model_type, text={"moe_intermediate_size": 22})
    dense, sparse = (
        build(checkpoint, tmp_path / name, ["ort-cpu"], sparsity=sparsity)
        for name, sparsity in (("dense", ""), ("sparse", "2:4"))
    )
    zeros = 0
    for graph in ("vision", "decoder"):
        before, after = initializers(dense.directory, graph), initializers(sparse.directory, graph)
        assert before.keys() == after.keys()
        for name, array in before.items():
            if array.ndim == 2 and array.shape[1] % 4 == 0 and not any(part in name for part in KEPT):
                fours = after[name].reshape(-1, 4)
                assert ((fours == 0).sum(1) == 2).all(), name
                assert after[name].tobytes() == prune(array).tobytes(), name
                zeros += after[name].size // 2
            else:
                assert after[name].tobytes() == array.tobytes(), name
    metadata = sparse.manifest.engines["ort-cpu"]
    assert (metadata.sparsity, metadata.pruned_weights) == ("2:4", zeros)
    assert zeros > 5000
    metadata = dense.manifest.engines["ort-cpu"]
    assert (metadata.sparsity, metadata.pruned_weights) == ("", 0)


def test_pruned_engines_are_held_to_the_pruned_model_and_dense_ones_to_transformers(tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint("glm4v_moe", text={"vocab_size": 96}).save(tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "b", ["reference"])
    bundle = add_targets(tmp_path / "b", checkpoint, ["ort-cpu", "cpu:int8"], sparsity="2:4")
    report = check_parity(bundle.directory, checkpoint)
    assert report.passed, table_of(report)
    assert report.pruned == ("ort-cpu", "cpu:int8")
    table = table_of(report).splitlines()
    notes = {line.split()[0]: "on the same weights" in line for line in table if line[:1].strip()}
    assert (notes["reference"], notes["ort-cpu"], notes["cpu:int8"]) == (False, True, True)


def test_engine_that_is_not_what_pruning_makes_fails(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    edit_manifest(bundle, lambda manifest: manifest["engines"]["ort-cpu"].update(sparsity="2:4"))
    report = check_parity(bundle, tiny_checkpoint, ["ort-cpu"])
    assert not report.passed
    failed = [check.quantity for check in report.checks if not check.passed and check.step == "ort-cpu"]
    assert {"image features", "hidden states", "prefill logits"} <= set(failed)


@pytest.mark.parametrize("names", [["reference"], ["ort-cpu", "reference"]])
def test_reference_stays_dense(names: list[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"^reference is the checkpoint itself and stays dense"):
        build(tiny_checkpoint, tmp_path / "b", names, sparsity="2:4")
    assert not list(tmp_path.iterdir())


def test_other_patterns_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"^unsupported value sparsity = '1:4' \(allowed: 2:4\)$"):
        build(tiny_checkpoint, tmp_path / "b", ["ort-cpu"], sparsity="1:4")


def test_command_line_says_what_was_pruned_and_inspect_shows_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    result = call("build", tiny_checkpoint, "-o", bundle, "--target", "cpu:int4", "--sparsity", "2:4")
    zeros = Bundle.open(bundle).manifest.engines["cpu:int4"].pruned_weights
    assert f"pruned 2:4: {zeros:,} weights of dense layers are zero: check the accuracy" in result.out
    assert re.search(r"^cpu:int4 +int4/32, 2:4 ", call("inspect", bundle).out, flags=re.M)
    result = call("build", bundle, "--checkpoint", tiny_checkpoint, "--target", "cpu:int4")
    assert "pruned" not in result.out
    assert Bundle.open(bundle).manifest.engines["cpu:int4"].sparsity == ""
    assert_refused(call("build", tiny_checkpoint, "-o", bundle, "--target", "reference", "--sparsity", "2:4"), "dense")


# Builds one plan, and says which of the flags were set when TensorRT got its configuration.
_BUILD_AND_TELL = """
import sys, msgspec
from moevlm.export.backends.tensorrt import plan_builder
write = plan_builder._write
def told(module, builder, network, config, *rest):
    flags = [name for name, flag in module.BuilderFlag.__members__.items() if config.get_flag(flag)]
    print(msgspec.json.encode(flags).decode())
    write(module, builder, network, config, *rest)
plan_builder._write = told
job = msgspec.json.decode(sys.stdin.buffer.read(), type=plan_builder.Job)
print(msgspec.json.encode(plan_builder.build_plan(job, lambda *_: None)).decode())
"""


def test_tensorrt_rtx_is_given_pruned_weights_and_the_flag_for_them(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, list[str]] = {}
    given: dict[str, np.ndarray] = {}

    def run(job: Job, progress: object) -> Built:  # noqa: ARG001
        for node in onnx.load(job.onnx).graph.initializer:
            given[node.name] = onnx.numpy_helper.to_array(node)
        command = [sys.executable, "-c", _BUILD_AND_TELL]
        done = subprocess.run(command, input=msgspec.json.encode(job), stdout=subprocess.PIPE, check=True)
        told, built = done.stdout.splitlines()[-2:]
        flags[Path(job.onnx).stem] = msgspec.json.decode(told)
        return msgspec.json.decode(built, type=Built)

    monkeypatch.setattr(worker, "run", run)
    built = build(tiny_checkpoint, tmp_path / "b", ["rtx:sm89"], sparsity="2:4")
    assert flags == {"vision": ["SPARSE_WEIGHTS"], "decoder": ["SPARSE_WEIGHTS"]}
    zeros = 0
    for name, array in given.items():
        if array.ndim == 2 and array.shape[1] % 4 == 0 and array.dtype == ml_dtypes.bfloat16:
            pruned_fours = (array.reshape(-1, 4) == 0).sum(1) == 2
            assert pruned_fours.all() != any(part in name for part in KEPT), name
            zeros += array.size // 2 if pruned_fours.all() else 0
    metadata = built.manifest.engines["rtx:sm89:bf16"]
    assert (metadata.sparsity, metadata.pruned_weights) == ("2:4", zeros)
    assert zeros > 5000
