"""Errors that kernels and packers make, in an engine's numbers: every one is far outside of what rounding explains."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from moevlm.export.build import build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.weights import Constant, Weight, read
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.export.parity.cases import pack, random_cases
from moevlm.export.parity.debug_engine import DebugEngine
from moevlm.export.parity.layer_reference import Deviation, Rounding, layer_deviations
from moevlm.export.parity.recorded_engine import RecordedEngine, RecordedSequence
from moevlm.export.parity.run import check_parity
from moevlm.export.parity.stored_weights import stored_weights
from moevlm.export.parity.tolerances import QUANTIZED
from moevlm.runtime.bundle.reader import Bundle
from tests.support.bundles import rehash
from tests.support.tiny import TinyCheckpoint

TARGETS = ("cpu:int8", "cpu:int4", "ort-cpu:int8", "ort-cpu:int4")
# Square matrices, so that a transposed one fits; biases to drop; one dense and one sparse layer.
TINY = TinyCheckpoint("glm4v_moe", text={"moe_intermediate_size": 32, "vocab_size": 96}, seed=3)
EXPERTS = "layers.1.feed_forward"


class Recording:
    """What each quantized engine of one bundle did with one batch, and the weights that it has."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = TINY.save(folder / "checkpoint")
        self.bundle = build(self.checkpoint, folder / "bundle", TARGETS).directory
        bundle = Bundle.open(self.bundle)
        self.weights: dict[str, dict[str, Weight]] = {}
        self.sequences: dict[str, list[RecordedSequence]] = {}
        self.rounding: dict[str, Rounding] = {}
        with Checkpoint.open(self.checkpoint) as source:
            model = CanonicalModel.of(source)
            self.config, metadata = model.config, bundle.manifest.model
            cases = random_cases(metadata, source.config, 3)
            for target in TARGETS:
                entry = bundle.manifest.engines[target]
                engine = RecordedEngine(DebugEngine(bundle, target, self.config))
                images = pack(cases, metadata)
                assert images is not None
                prompts = [case.prompt for case in cases]
                limits = BatchLimits.of(prompts, engine.limits)
                batch = Batch(engine, metadata, prompts, [engine.encode(images)], limits)
                batch.prefill(every_position=True)
                for token in range(8, 16):
                    batch.decode([token] * len(cases))
                _, weights = stored_weights(model, entry)
                self.weights[target] = {name: Constant(read(weight)) for name, weight in weights.items()}
                self.sequences[target] = engine.sequences()
                self.rounding[target] = Rounding.of(entry)

    def deviations(
        self, target: str, change: Callable[[dict[str, np.ndarray]], None] = lambda _: None
    ) -> list[Deviation]:
        """change: edits copies of the reference's weights, as if the engine had the opposite error."""
        arrays = {name: read(weight).copy() for name, weight in self.weights[target].items()}
        change(arrays)
        weights = {name: Constant(array) for name, array in arrays.items()}
        return list(layer_deviations(self.config, weights, self.rounding[target], self.sequences[target]))


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return Recording(tmp_path_factory.mktemp("recording"))


@pytest.mark.parametrize("target", TARGETS)
def test_right_engine_rounds_as_much_as_the_reference(recording: Recording, target: str) -> None:
    found = recording.deviations(target)
    assert [d.name for d in found] == ["layer 0", "router of layer 1", "layer 1", "head"]
    assert all(0.8 < d.overall < 1.05 and d.worst_row < 1.1 for d in found)


def swap_gate_and_up(weights: dict[str, np.ndarray]) -> None:
    weights[f"{EXPERTS}.gate_up"][2] = np.roll(weights[f"{EXPERTS}.gate_up"][2], 32, axis=0)


def transpose_an_expert(weights: dict[str, np.ndarray]) -> None:
    weights[f"{EXPERTS}.down"][2] = weights[f"{EXPERTS}.down"][2].T.copy()


def exchange_two_experts(weights: dict[str, np.ndarray]) -> None:
    for name in ("gate_up", "down"):
        weights[f"{EXPERTS}.{name}"][[2, 5]] = weights[f"{EXPERTS}.{name}"][[5, 2]]


def take_scales_of_the_next_row(weights: dict[str, np.ndarray]) -> None:
    down = weights[f"{EXPERTS}.down"]
    size = np.abs(down).max(-1, keepdims=True)
    down *= np.roll(size, 1, axis=1) / size


def double_a_scale_of_each_row(weights: dict[str, np.ndarray]) -> None:
    weights["layers.0.attention.out.weight"][:, 32:] *= 2


def shift_a_block(weights: dict[str, np.ndarray]) -> None:
    out = weights["layers.0.attention.out.weight"]
    out[:, :] = np.roll(out, 32, axis=1)


def drop_the_bias_of(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[f"layers.0.attention.{name}.bias"][:] = 0

    return change


def lose_the_last_row_of_the_head(weights: dict[str, np.ndarray]) -> None:
    weights["head"][-1] = 0


def exchange_two_router_rows(weights: dict[str, np.ndarray]) -> None:
    name = f"{EXPERTS}.router.weight"
    weights[name][[0, 1]] = weights[name][[1, 0]]


CHANGES = {
    "gate and up": swap_gate_and_up,
    "transposed expert": transpose_an_expert,
    "exchanged experts": exchange_two_experts,
    "scales of the next row": take_scales_of_the_next_row,
    "one scale": double_a_scale_of_each_row,
    "shifted block": shift_a_block,
    "query bias": drop_the_bias_of("q"),
    "value bias": drop_the_bias_of("v"),
    "last row of the head": lose_the_last_row_of_the_head,
    "router rows": exchange_two_router_rows,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("change", CHANGES)
def test_wrong_weight_is_far_outside_of_rounding(recording: Recording, target: str, change: str) -> None:
    found = recording.deviations(target, CHANGES[change])
    assert any(d.overall > 2 * QUANTIZED.rounding or d.worst_row > 2 * QUANTIZED.row for d in found)


def test_exchanged_experts_in_an_engine_file_fail_its_parity_and_name_the_layer(
    recording: Recording, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(recording.bundle, tmp_path / "bundle"))
    decoder = bundle / "engines/cpu-int4/decoder.onnx"
    graph = onnx.load(decoder, load_external_data=False).graph
    (tensor,) = [tensor for tensor in graph.initializer if tensor.name == f"{EXPERTS}.down.int4"]
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = decoder.with_name(place["location"])
    content = bytearray(data.read_bytes())
    experts = np.frombuffer(content, np.uint8, int(place["length"]), int(place["offset"])).reshape(tensor.dims)
    experts[[2, 5]] = experts[[5, 2]]
    data.unlink()
    data.write_bytes(content)
    rehash(bundle, str(data.relative_to(bundle)))
    report = check_parity(bundle, recording.checkpoint, ["cpu:int8", "cpu:int4"])
    failed = {(check.step, check.quantity): check for check in report.checks if not check.passed}
    assert set(failed) == {("cpu:int4", "layers, one by one"), ("cpu:int4", "worst single token")}
    assert failed["cpu:int4", "layers, one by one"].note == "first over the limit: layer 1"
    results = {name: entry["result"] for name, entry in Bundle.open(bundle).manifest.parity.items()}
    assert results == {"cpu:int8": "passed", "cpu:int4": "failed"}


def test_rows_that_are_not_numbers_are_infinitely_far() -> None:
    exact = np.ones((2, 3), np.float32)
    for wrong in (np.array([[1, np.nan, 1], [1, 1, 1]], np.float32), np.ones((2, 4), np.float32)):
        assert Deviation.of("layer 0", wrong, exact, exact + 0.1).overall == np.inf


def test_value_that_nothing_rounds_may_differ_by_float32_alone() -> None:
    exact = np.full((4, 3), 2, np.float32)
    assert Deviation.of("layer 0", exact, exact, exact).overall == 0
    assert Deviation.of("layer 0", exact * (1 + 1e-6), exact, exact).overall < 1
    assert Deviation.of("layer 0", exact * (1 + 1e-4), exact, exact).overall > QUANTIZED.rounding
