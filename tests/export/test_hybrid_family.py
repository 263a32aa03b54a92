"""A family whose layers differ, through every seam, held to its own plain PyTorch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moevlm.export.build import build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.config import LayerConfig
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.export.parity.debug_engine import DebugEngine
from moevlm.export.parity.layer_reference import Rounding, layer_deviations
from moevlm.export.parity.measures import relative_error
from moevlm.export.parity.recorded_engine import RecordedEngine
from moevlm.export.parity.stored_weights import stored_weights
from moevlm.export.parity.tolerances import QUANTIZED
from moevlm.export.parity.torch_engine import TorchEngine
from moevlm.export.passes.base import checked
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import FieldError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.states import PagedKV, Recurrent
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.step import Step
from moevlm.runtime.loading import load_engine
from moevlm.runtime.request.positions import query_scales, rope_tables
from moevlm.runtime.request.prompt import Prompt
from tests.support.families.base import VOCABULARY
from tests.support.hybrid import PlainModel, save
from tests.support.hybrid.checkpoint import LAYERS
from tests.support.hybrid.family import DENSE, WIDE
from tests.support.packed_steps import reserved, rows

Array = np.ndarray
LENGTHS = (90, 37, 5)  # tokens: more than a page, more than two windows, less than one
pytestmark = pytest.mark.usefixtures("hybrid_family")

QUANTIZED_TARGETS = ("cpu:int8", "cpu:int4")
TARGETS = ("reference", "ort-cpu", *QUANTIZED_TARGETS)
EXACT = 1e-5  # float32 against float64, relative to the largest logit

# How many tokens each sequence takes in each step.
TRAFFIC = {
    "one after the other": [(90, 0, 0), (0, 37, 0), (0, 0, 5)],
    "all at once": [LENGTHS],
    "chunks": [(16, 16, 4), (33, 1, 1), (1, 20, 0), (40, 0, 0)],
    "token by token behind a prompt": [(70, 30, 1), *[(1, 1, 1)] * 4, (1, 1, 0), (1, 1, 0), (1, 1, 0), (13, 0, 0)],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("hybrid") / "checkpoint")


@pytest.fixture(scope="module")
def sequences() -> list[Array]:
    rng = np.random.default_rng(11)
    return [rng.integers(0, VOCABULARY, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, sequences: list[Array]) -> list[Array]:
    model = PlainModel(load_file(checkpoint / "model.safetensors"), LAYERS)
    return [model.logits(torch.from_numpy(ids)).numpy() for ids in sequences]


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    with checked():
        return build(checkpoint, tmp_path_factory.mktemp("hybrid") / "hybrid.moevlm", TARGETS)


def logits_of(
    engine: Engine, model: ModelMetadata, sequences: list[Array], traffic: list[tuple[int, ...]]
) -> list[Array]:
    """[S, vocabulary] of each sequence. A sequence of a step with no token is left out of it."""
    each = -(-max(map(len, sequences)) // engine.limits.page_size)  # pages, as many for all
    pages = [np.arange(1 + each * n, 1 + each * (n + 1), dtype=np.int32)[::-1] for n in range(len(sequences))]
    engine.reserve(1 + each * len(sequences), 1 + len(sequences))
    kept, rows = [0] * len(sequences), [[] for _ in sequences]
    for counts in traffic:
        parts = [(n, range(kept[n], kept[n] + count)) for n, count in enumerate(counts) if count]
        positions = np.concatenate([np.array(part) for _, part in parts])
        step = Step(
            input_ids=np.concatenate([sequences[n][part.start : part.stop] for n, part in parts]),
            visual_index=np.full(len(positions), -1),
            rope={str(g): rope_tables(np.stack([positions] * 3), rope) for g, rope in enumerate(model.ropes)},
            query_start=np.cumsum([0, *(len(part) for _, part in parts)]).astype(np.int32),
            context_len=np.array([part.start for _, part in parts], np.int32),
            page_table=np.stack([pages[n] for n, _ in parts]),
            state_row=np.array([3 - n for n, _ in parts], np.int32),
            logits_index=np.arange(len(positions), dtype=np.int32),
            cleared=tuple(3 - n for n, part in parts if part.start == 0),
            query_scale=None if model.query_scale is None else query_scales(positions, model.query_scale),
        )
        output = engine.forward(step)
        found = iter(range(len(positions)))
        for n, part in parts:
            rows[n] += [output.logits(next(found)) for _ in part]
            kept[n] = part.stop
    return [np.stack(own) for own in rows]


@pytest.mark.parametrize("name", TRAFFIC)
def test_canonical_pytorch_is_the_plain_model(
    name: str, checkpoint: Path, sequences: list[Array], expected: list[Array]
) -> None:
    with Checkpoint.open(checkpoint) as source:
        model = CanonicalModel.of(source)

        def ask(engine: Engine) -> list[Array]:
            return logits_of(engine, model.metadata(), sequences, TRAFFIC[name])

        for ours, theirs in zip(ask(TorchEngine(model, ask)), expected, strict=True):
            assert relative_error(ours, theirs) < EXACT


@pytest.mark.parametrize("name", TRAFFIC)
def test_reference_is_the_plain_model_whatever_steps_hold(
    name: str, bundle: Bundle, sequences: list[Array], expected: list[Array]
) -> None:
    engine = load_engine(bundle, "reference")
    for ours, theirs in zip(logits_of(engine, bundle.manifest.model, sequences, TRAFFIC[name]), expected, strict=True):
        assert relative_error(ours, theirs) < EXACT
    engine.close()


def test_ort_cpu_is_the_plain_model_one_sequence_at_a_time(
    bundle: Bundle, sequences: list[Array], expected: list[Array]
) -> None:
    engine = load_engine(bundle, "ort-cpu")
    traffic = [(40, 0, 0), (0, 30, 0), (1, 0, 0), (0, 0, 5), (0, 7, 0), (49, 0, 0)]
    for ours, theirs in zip(logits_of(engine, bundle.manifest.model, sequences, traffic), expected, strict=True):
        assert relative_error(ours, theirs) < EXACT
    engine.close()


@pytest.mark.parametrize("target", QUANTIZED_TARGETS)
def test_every_layer_on_cpu_is_canonical_pytorch_but_for_rounding(
    target: str, checkpoint: Path, bundle: Bundle, sequences: list[Array]
) -> None:
    metadata = bundle.manifest.engines[target]
    with Checkpoint.open(checkpoint) as source:
        model = CanonicalModel.of(source)
        engine = RecordedEngine(DebugEngine(bundle, target, model.config))
        logits_of(engine, bundle.manifest.model, sequences, TRAFFIC["chunks"])
        _, stored = stored_weights(model, metadata)
        rounding = Rounding.of(metadata)
        found = list(layer_deviations(model.config, stored, rounding, engine.sequences()))
    names = [*(f"layer {i}" for i in range(len(LAYERS))), *(f"router of layer {i}" for i in model.config.moe_layers)]
    assert {deviation.name for deviation in found} == {*names, "head"}
    for deviation in found:
        assert deviation.overall <= QUANTIZED.rounding, deviation.name
        assert deviation.worst_row <= QUANTIZED.row, deviation.name


@pytest.mark.parametrize("target", QUANTIZED_TARGETS)
def test_rows_on_cpu_have_the_same_bits_whatever_steps_hold(
    target: str, bundle: Bundle, sequences: list[Array]
) -> None:
    engine, model = load_engine(bundle, target), bundle.manifest.model
    alone = logits_of(engine, model, sequences, TRAFFIC["one after the other"])
    for name, traffic in TRAFFIC.items():
        for ours, theirs in zip(logits_of(engine, model, sequences, traffic), alone, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
    engine.close()


@pytest.mark.parametrize("target", TARGETS)
def test_sequences_go_on_from_a_copy_of_what_another_kept(target: str, bundle: Bundle, sequences: list[Array]) -> None:
    engine, model = load_engine(bundle, target), bundle.manifest.model
    kept = reserved(engine, model, sequences=3)
    ids = sequences[0][:40].tolist()
    kept.run({0: ids[:30]})
    for copy in (1, 2):
        copies = tuple(zip(kept.pages[0], kept.pages[copy], strict=True))
        kept.lengths[copy] = 30
        step = replace(kept.step({copy: ids[30:]}), copies=copies, row_copies=((1, 1 + copy),))
        found = rows(engine.forward(step), 10)
        if copy == 1:
            first = found
    np.testing.assert_array_equal(found, first)
    np.testing.assert_array_equal(kept.run({0: ids[30:]}), first)  # which was left as it was
    engine.close()


@pytest.mark.parametrize("target", ["reference", "cpu:int8"])
def test_parity_asks_for_the_same_rows_in_few_or_many_steps(
    target: str, bundle: Bundle, sequences: list[Array]
) -> None:
    engine, model = load_engine(bundle, target), bundle.manifest.model
    prompts = [Prompt.from_ids(np.where(ids == model.image_token_id, 9, ids), [], model) for ids in sequences]
    limits = BatchLimits.of(prompts, engine.limits)
    found = [
        Batch(engine, model, prompts, [], replace(limits, logits=logits)).prefill(40, every_position=True)
        for logits in (limits.logits, 13)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5 * np.abs(found[0]).max())
    engine.close()


def test_manifest_says_what_each_layer_keeps(bundle: Bundle) -> None:
    for target in TARGETS:
        states = bundle.manifest.engines[target].states
        assert [type(state) for state in states] == [PagedKV, Recurrent, PagedKV, Recurrent, *[PagedKV] * 4]
        assert [state.window for state in states if isinstance(state, PagedKV)] == [0, 16, 16, 0, 0, 0]
        assert [state.value_in_key for state in states if isinstance(state, PagedKV)] == [*[False] * 5, True]
    shapes = [
        (layer.heads, layer.kv_heads, layer.key_dim, layer.value_dim, layer.experts)
        for layer in bundle.manifest.model.layers
    ]
    wide, recurrent, local, parallel = (4, 2, 16, 16, 8), (0, 0, 0, 0, 0), (2, 1, 32, 24, 8), (4, 2, 16, 16, 0)
    assert shapes == [wide, recurrent, local, recurrent, local, parallel, local, (4, 1, 48, 32, 8)]


def test_norms_in_another_place_are_refused() -> None:
    with pytest.raises(FieldError, match=r'norms = "post" \(allowed: pre, sandwich, parallel\)'):
        LayerConfig(WIDE, DENSE, norms="post")
