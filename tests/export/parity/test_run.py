"""Parity on random checkpoints of every shape, and what it says when something is wrong."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from moevlm.export.build import build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.parity import run as parity
from moevlm.export.parity.cases import LONG_PROMPT, long_cases, random_cases
from moevlm.export.parity.measures import relative_error
from moevlm.export.parity.report import Check, ParityReport, table_of
from moevlm.export.parity.run import check_parity
from moevlm.export.parity.tolerances import DECODE_STEPS, EXACT
from moevlm.runtime.backends.ort.engine import OrtEngine
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError, CheckpointError
from moevlm.runtime.core.reports import to_json
from moevlm.runtime.core.states import PAGE_SIZE
from moevlm.runtime.engine.step import Step, StepOutput
from tests.support.bundles import rehash
from tests.support.families import TINY
from tests.support.families.base import IMAGE
from tests.support.tiny import TinyCheckpoint, edit_tensors

FEATURES = ["image features", "deepstack features"]
INSIDE = ["routings that differ", "hidden states"]
OUTPUTS = [
    "prefill logits",
    "chunked prefill logits",
    "decode logits",
    "each prompt alone",
    "first choices that differ",
]


SMALL = {"vocab_size": 96}
CHECKPOINTS = {
    f"{short}, {name}": TinyCheckpoint(model_type, **options)
    for short, model_type in (
        ("qwen", "qwen3_vl_moe"),
        ("glm", "glm4v_moe"),
        ("qwen3.5", "qwen3_5_moe"),
        ("gemma4", "gemma4"),
        ("llama4", "llama4"),
    )
    for name, options in TINY[model_type].configurations.items()
}


QUANTIZED_TARGETS = ("ort-cpu:int8", "ort-cpu:int4", "cpu:int8", "cpu:int4")


QUANTITIES = [
    *FEATURES,
    "logits with debug outputs",
    "choices unlike its router logits",
    "routers, one by one",
    "layers, one by one",
    "worst single token",
    "head",
]
COSTS = ["prefill KL", "decode KL", "share of routings that differ", "last hidden states"]


@pytest.mark.parametrize(
    "name",
    [
        "qwen, tied head, bf16, one expert of four",
        "qwen, every other layer sparse, attention bias, one key-value head",
        "glm, groups, shared expert",
        "qwen3.5, three of the delta rule to one of attention, a quarter of a head turned",
        "gemma4, keys as values, bf16",
        "llama4, as Scout, bf16",
    ],
)
def test_quantized_engines_round_as_their_bits_say_and_nothing_else(name: str, tmp_path: Path) -> None:
    tiny = CHECKPOINTS[name]
    if "moe_intermediate_size" in TINY[tiny.model_type].fields["text"]:  # whole blocks of 16
        tiny = replace(tiny, text=dict(tiny.text) | {"moe_intermediate_size": 48})
    checkpoint = tiny.save(tmp_path / "checkpoint")
    bundle = build(checkpoint, tmp_path / "b", QUANTIZED_TARGETS).directory
    report = check_parity(bundle, checkpoint, seed=tiny.seed)
    assert [check for check in report.checks if not check.passed] == []
    for target in QUANTIZED_TARGETS:
        found = {check.quantity: check for check in report.checks if check.step == target}
        features = FEATURES if tiny.model_type == "qwen3_vl_moe" else FEATURES[:1]
        assert list(found) == [*features, *QUANTITIES[2:]]
        # It repeats what these engines round, so they come out at 1 or, where a kernel rounds less, a little below.
        for quantity in ("image features", "routers, one by one", "layers, one by one", "head"):
            assert 0.8 < found[quantity].value < 1.05
    costs = {(cost.step, cost.quantity): cost.value for cost in report.costs}
    assert [cost.quantity for cost in report.costs] == COSTS * len(QUANTIZED_TARGETS)
    assert costs["cpu:int8", "decode KL"] < costs["cpu:int4", "decode KL"]
    noted = Bundle.open(bundle).manifest.parity["cpu:int4"]
    assert noted["costs"]["prefill KL"] == costs["cpu:int4", "prefill KL"]
    shown = table_of(report)
    assert "rounded weights: against canonical PyTorch on the same weights" in shown
    assert "what rounding costs is shown above" in shown.splitlines()[-1]


def test_flipped_routings_are_listed_with_their_margins(tmp_path: Path) -> None:
    tiny = replace(CHECKPOINTS["glm, groups, shared expert"], text=SMALL | {"moe_intermediate_size": 48})
    checkpoint = tiny.save(tmp_path / "checkpoint")
    bundle = build(checkpoint, tmp_path / "b", ["cpu:int4"]).directory
    report = check_parity(bundle, checkpoint)
    (routing,) = [cost for cost in report.costs if cost.quantity == "share of routings that differ"]
    assert routing.flips
    metadata = Bundle.open(bundle).manifest.model
    config = json.loads((checkpoint / "config.json").read_text())
    cases = random_cases(metadata, config, 0) + long_cases(metadata, config, 0, metadata.context)
    tokens = sum(len(case.prompt.ids) for case in cases)
    assert routing.value == len(routing.flips) / tokens  # one of the two layers is sparse
    assert {flip.layer for flip in routing.flips} == {1}
    assert all(0 < flip.margin < 0.5 for flip in routing.flips)
    noted = Bundle.open(bundle).manifest.parity["cpu:int4"]
    assert noted["costs"]["share of routings that differ"] == routing.value
    assert noted["flip_margins"] == sorted(flip.margin for flip in routing.flips)


@pytest.mark.parametrize(
    "name",
    [
        "qwen, on the hub, many shards",
        "qwen, no deepstack, wide heads, odd patches, yarn",
        "glm, groups, shared expert",
        "glm, two of four groups, weights as they are, tied head",
        "qwen3.5, as many value heads as key heads, short kernel, biases, bf16",
        "gemma4, full layers in between, causal images, wide rope, untied head, biases",
        "llama4, three experts, biases, heads of one size, layers named, tiles of four tokens",
    ],
)
def test_every_step_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    tiny = CHECKPOINTS[name]
    checkpoint = tiny.save(tmp_path / "checkpoint")
    bundle = build(checkpoint, tmp_path / "b", ["reference", "ort-cpu"]).directory
    report = check_parity(bundle, checkpoint, seed=tiny.seed)
    assert [check for check in report.checks if not check.passed] == []
    assert report.passed
    deepstack = tiny.model_type == "qwen3_vl_moe" and tiny.vision.get("deepstack_visual_indexes") != []
    features = FEATURES if deepstack else FEATURES[:1]
    assert [(check.step, check.quantity) for check in report.checks] == [
        *(("requests", quantity) for quantity in ("conversations", "images")),
        *(("canonical PyTorch", quantity) for quantity in [*features, INSIDE[0], *OUTPUTS]),
        *((engine, quantity) for engine in ("reference", "ort-cpu") for quantity in [*features, *INSIDE, *OUTPUTS]),
    ]
    # float32 on both sides: far below the limit, so that a slow drift towards it shows here first.
    # transformers' own chunks of the delta rule are the less exact side.
    assert max(check.value for check in report.checks) < EXACT.logits / (2 if tiny.model_type == "qwen3_5_moe" else 10)


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.moevlm"))


def change_weight(bundle: Path, graph: str, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Edit one initializer of `graph` where it lies, and the manifest's hash of the file."""
    path = bundle / graph
    proto = onnx.load(path, load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    if place:
        path = path.with_name(place["location"])
        content = bytearray(path.read_bytes())
        count = int(np.prod(tensor.dims))
        change(np.frombuffer(content, np.float32, count, int(place["offset"])).reshape(tensor.dims))
    else:
        array = onnx.numpy_helper.to_array(tensor).copy()
        change(array)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
        content = proto.SerializeToString()
    path.unlink()
    path.write_bytes(content)
    rehash(bundle, str(path.relative_to(bundle)))


def add(amount: float) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array.reshape(-1)[len(array.reshape(-1)) // 3] += amount

    return change


def failures(report: ParityReport) -> list[str]:
    assert report.passed == all(check.passed for check in report.checks)
    return [check.quantity for check in report.checks if not check.passed]


def test_one_wrong_weight_in_a_layer_fails_that_engine_alone_and_names_the_layer(
    copy: Path, tiny_checkpoint: Path
) -> None:
    change_weight(copy, "engines/ort-cpu/decoder.onnx", "layers.1.attention.out.weight", add(1))
    report = check_parity(copy, tiny_checkpoint)
    assert not report.passed
    failed = [check for check in report.checks if not check.passed]
    assert {check.step for check in failed} == {"ort-cpu"}
    (hidden,) = [check for check in failed if check.quantity == "hidden states"]
    assert hidden.note == "first over the limit: layer 1"
    assert hidden.value > hidden.limit == EXACT.features
    assert {"prefill logits", "chunked prefill logits", "decode logits"} <= set(failures(report))


@pytest.mark.parametrize(
    ("graph", "weight", "quantity"),
    [
        ("vision", "blocks.0.mlp.up.weight", "image features"),
        ("vision", "deepstack_mergers.1.mlp.down.bias", "deepstack features"),
        ("decoder", "layers.1.attention.out.weight", "routings that differ"),
        ("decoder", "layers.1.feed_forward.down", "hidden states"),
        ("decoder", "norm.weight", "prefill logits"),
        ("decoder", "head", "prefill logits"),
    ],
)
def test_the_first_failing_check_is_where_the_wrong_weight_is(
    graph: str, weight: str, quantity: str, copy: Path, tiny_checkpoint: Path
) -> None:
    change_weight(copy, f"graphs/{graph}.onnx", weight, add(0.5))
    report = check_parity(copy, tiny_checkpoint, ["reference"])
    assert failures(report)[0] == quantity


@pytest.mark.parametrize("engine", ["reference", "ort-cpu"])
def test_a_wrong_router_row_is_counted_in_routings(engine: str, copy: Path, tiny_checkpoint: Path) -> None:
    folder = {"reference": "graphs", "ort-cpu": "engines/ort-cpu"}[engine]

    def change(array: np.ndarray) -> None:
        array[3] *= -1

    change_weight(copy, f"{folder}/decoder.onnx", "layers.0.feed_forward.router.weight", change)
    report = check_parity(copy, tiny_checkpoint, [engine])
    assert failures(report)[0] == "routings that differ"
    check = next(check for check in report.checks if not check.passed)
    assert check.value >= 1
    assert "first in layer 0, widest margin" in check.note
    assert Bundle.open(copy).manifest.parity[engine]["result"] == "failed"


def test_a_checkpoint_that_transformers_reads_otherwise_fails_at_canonical_pytorch(
    save_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_checkpoint(text=SMALL)
    bundle = build(checkpoint, tmp_path / "b", ["ort-cpu"]).directory
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    edit_tensors(other, lambda tensors: tensors["model.language_model.norm.weight"].mul_(1.01))
    oracle = parity.Oracle
    monkeypatch.setattr(parity, "Oracle", lambda _, *others: oracle(Checkpoint.open(other), *others))
    report = check_parity(bundle, checkpoint)
    first = next(check for check in report.checks if not check.passed)
    assert (first.step, first.quantity) == ("canonical PyTorch", "prefill logits")
    assert Bundle.open(bundle).manifest.parity["ort-cpu"]["result"] == "failed"


def test_verdict_lands_in_the_manifest_and_every_other_file_stays(copy: Path, tiny_checkpoint: Path) -> None:
    names = sorted(copy.rglob("*"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != "manifest.json"}
    report = check_parity(copy, tiny_checkpoint, ["ort-cpu"], seed=5)
    bundle = Bundle.open(copy)
    bundle.verify()
    assert set(bundle.manifest.parity) == {"ort-cpu"}
    noted = bundle.manifest.parity["ort-cpu"]
    assert noted == {
        "result": "passed",
        "transformers": report.transformers,
        "seed": 5,
        "checks": {check.quantity: check.value for check in report.checks if check.step == "ort-cpu"},
        "flip_margins": [],
    }
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(copy.rglob("*")) == names
    check_parity(copy, tiny_checkpoint, ["reference"], seed=6)
    parities = Bundle.open(copy).manifest.parity
    assert parities["ort-cpu"] == noted
    assert parities["reference"]["seed"] == 6


def test_prompts_depend_on_the_seed_alone(tiny_bundle: Path) -> None:
    metadata = Bundle.open(tiny_bundle).manifest.model
    first, again, other = (random_cases(metadata, {"image_token_id": IMAGE}, seed) for seed in (1, 1, 2))
    for case, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(case.prompt.ids, same.prompt.ids)
        np.testing.assert_array_equal(case.patches, same.patches)
        assert case.grids == same.grids
        assert list(case.prompt.ids) != list(different.prompt.ids)
    assert [len(case.grids) for case in first] == [0, 1, 2, 3]
    assert len({len(case.prompt.ids) for case in first}) > 1


def test_a_prompt_is_longer_than_every_block_of_keys_that_a_kernel_takes() -> None:
    plugins = Path(__file__).parents[3] / "plugins/cpu/attention"
    source = "".join(path.read_text() for path in plugins.rglob("*") if path.suffix in (".h", ".cpp"))
    (block,) = re.findall(r"\bkBlock = (\d+)", source)
    assert max(int(block), PAGE_SIZE) < LONG_PROMPT


def test_long_prompt_is_as_long_as_the_cache_allows(tiny_bundle: Path) -> None:
    metadata, config = Bundle.open(tiny_bundle).manifest.model, {"image_token_id": IMAGE}
    for capacity, length in ((512, LONG_PROMPT), (DECODE_STEPS + 100, 100), (DECODE_STEPS + 1, 1)):
        (case,) = long_cases(metadata, config, 0, capacity)
        assert (len(case.prompt.ids), len(case.whole.ids)) == (length, length + DECODE_STEPS)
        assert IMAGE not in case.whole.ids
    assert long_cases(metadata, config, 0, DECODE_STEPS) == []


@pytest.mark.parametrize("whole", [False, True])  # as shipped alone, or the engine with debug outputs, too
def test_fault_behind_the_first_block_of_keys_is_found(
    whole: bool, copy: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OrtEngine.forward

    def wrong(self: OrtEngine, step: Step, *arguments: Any) -> StepOutput:
        found = right(self, step, *arguments)
        if not whole and found.outputs:
            return found
        late = step.context_len[0] + np.arange(step.tokens) >= 128  # a step has one sequence
        outputs = {name: values.copy() for name, values in found.outputs.items()}
        for name, values in outputs.items():
            values[late] *= 1 if name.endswith("index") else 1.01
        factors = np.where(late[step.logits_index], np.float32(1.01), np.float32(1))
        return replace(found, logits=lambda row: found.logits(row) * factors[row], outputs=outputs)

    monkeypatch.setattr(OrtEngine, "forward", wrong)
    found = failures(check_parity(copy, tiny_checkpoint, ["ort-cpu"]))
    assert {"prefill logits", "chunked prefill logits", "decode logits"} <= set(found)
    assert ("hidden states" in found) == whole


def test_another_checkpoint_and_an_absent_engine_are_refused(
    copy: Path, tiny_checkpoint: Path, save_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match="not the file that the bundle was exported from"):
        check_parity(copy, save_checkpoint(seed=77))
    with pytest.raises(BundleError, match="no engine 'ort-cuda'"):
        check_parity(copy, tiny_checkpoint, ["ort-cuda"])


REPORT = ParityReport(
    bundle="demo.moevlm",
    checkpoint="checkpoint",
    transformers="5.23.0",
    seed=3,
    prompts=4,
    tokens=99,
    passed=False,
    checks=[
        Check("ort-cpu", "prefill logits", 1e-6, 1e-4, True),
        Check("ort-cpu", "routings that differ", 2.0, 0, False, "of 9, widest margin 1.0e-01"),
    ],
)


def test_bundle_without_an_engine_is_not_called_good(tiny_checkpoint: Path, tmp_path: Path) -> None:
    build(tiny_checkpoint, tmp_path / "b")
    with pytest.raises(BundleError, match="has no engine to check"):
        check_parity(tmp_path / "b", tiny_checkpoint)


def test_penalties_of_the_checkpoint_do_not_bend_what_greedy_means(
    save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(seed=40)
    penalties = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    (checkpoint / "generation_config.json").write_text(json.dumps(penalties))
    build(checkpoint, tmp_path / "b", ["ort-cpu"])
    assert check_parity(tmp_path / "b", checkpoint).passed


def test_json_has_the_documented_fields_and_reads_back() -> None:
    text = to_json(REPORT)
    assert msgspec.json.decode(text, type=ParityReport) == REPORT
    plain = json.loads(text)
    assert plain["schema"] == "moevlm.parity/1"
    assert set(plain) == {"schema", *ParityReport.__struct_fields__}
    assert plain["checks"][1] == {
        "step": "ort-cpu",
        "quantity": "routings that differ",
        "value": 2.0,
        "limit": 0,
        "passed": False,
        "note": "of 9, widest margin 1.0e-01",
        "flips": [],
        "compared": True,
    }


def test_infinite_error_is_null_in_json() -> None:
    infinite = msgspec.structs.replace(REPORT, checks=[Check("ort-cpu", "prefill logits", float("inf"), 1e-4, False)])
    assert json.loads(to_json(infinite))["checks"][0]["value"] is None


def test_table_names_the_first_failure() -> None:
    printed = table_of(REPORT)
    assert "MISMATCH" in printed
    assert "parity: failed, first at ort-cpu: routings that differ" in printed


@pytest.mark.parametrize(
    ("ours", "theirs", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0),
        ([1.0, -3.0], [1.0, -4.0], 0.25),
        ([0.5, 0.0], [0.0, 0.0], np.inf),
        ([[1.0]], [1.0], np.inf),
        ([1.0, 1.0], [1.0], np.inf),
        ([np.nan, 1.0], [0.0, 1.0], np.inf),
        ([np.inf, 1.0], [np.inf, 1.0], np.inf),
        ([1.0, 1.0], [np.nan, 1.0], np.inf),
    ],
)
def test_relative_error_cannot_be_fooled_by_shape_nan_or_infinity(ours: list, theirs: list, error: float) -> None:
    value = relative_error(np.array(ours, np.float32), np.array(theirs, np.float32))
    assert value == error or (np.isinf(error) and value > 1e30)


def test_a_model_without_experts_goes_through_parity(save_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_checkpoint(model_type="qwen3_5", text=SMALL)
    bundle = build(checkpoint, tmp_path / "b", ["cpu:int4", "ort-cpu"]).directory
    report = check_parity(bundle, checkpoint, quick=True)
    assert [check for check in report.checks if not check.passed] == []
    assert not any("rout" in check.quantity or "choices unlike" in check.quantity for check in report.checks)
    assert {cost.quantity for cost in report.costs} == {"prefill KL", "decode KL", "last hidden states"}
