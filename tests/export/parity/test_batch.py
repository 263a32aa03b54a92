"""Prompts in an engine: how they fit into its steps, and that the way they are cut changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.export.parity.cases import Case, pack, random_cases
from moevlm.export.parity.measures import relative_error
from moevlm.export.parity.tolerances import EXACT
from moevlm.export.parity.torch_engine import TorchEngine
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.step import EngineLimits
from tests.support.tiny import TinyCheckpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CanonicalModel, list[Case]]]:
    checkpoint = TinyCheckpoint(text={"vocab_size": 96}).save(tmp_path_factory.mktemp("checkpoint"))
    with Checkpoint.open(checkpoint) as source:
        found = CanonicalModel.of(source)
        yield found, random_cases(found.config.metadata(), source.config, 5)


def test_prompts_fit_into_what_the_engine_takes(model: tuple[CanonicalModel, list[Case]]) -> None:
    prompts = [case.prompt for case in model[1]]
    longest = max(len(prompt.ids) for prompt in prompts)
    engine = EngineLimits(2, 24, 20, 512, 16)
    assert BatchLimits.of(prompts, engine, 30) == BatchLimits(2, 24, 20, 16, 30)
    assert BatchLimits.of(prompts, replace(engine, max_context=longest + 9), 30).steps == 9
    assert BatchLimits.of(prompts, replace(engine, max_context=longest), 0).steps == 0
    with pytest.raises(RequestError, match=f"parity needs a context of {longest + 1} tokens, the engine has {longest}"):
        BatchLimits.of(prompts, replace(engine, max_context=longest), 30)


@pytest.mark.parametrize(
    ("sequences", "tokens", "logits", "chunk"),
    [(1, 100, 100, None), (1, 9, 4, None), (3, 24, 24, None), (2, 5, 1, 7), (4, 1000, 7, 6), (4, 3, 2, 1)],
)
def test_any_way_to_cut_prompts_gives_the_same_logits(
    sequences: int, tokens: int, logits: int, chunk: int | None, model: tuple[CanonicalModel, list[Case]]
) -> None:
    canonical, cases = model
    metadata, prompts = canonical.config.metadata(), [case.prompt for case in cases]
    images = pack(cases, metadata)
    assert images is not None

    def run(engine: Engine, limits: BatchLimits, chunk: int | None) -> list[np.ndarray]:
        batch = Batch(engine, metadata, prompts, [engine.encode(images)], limits)
        every = batch.prefill(chunk, every_position=True)
        later = [batch.decode([case.continuation[n] for case in cases]) for n in range(2)]
        batch = Batch(engine, metadata, prompts, [engine.encode(images)], limits)
        return [every, *later, batch.prefill(chunk)]

    def both(engine: Engine) -> list[tuple[np.ndarray, np.ndarray]]:
        whole = BatchLimits.of(prompts, engine.limits, 2)
        cut = replace(whole, sequences=sequences, tokens=tokens, logits=logits)
        return list(zip(run(engine, cut, chunk), run(engine, whole, None), strict=True))

    found = both(TorchEngine(canonical, both))
    for ours, theirs in found:
        assert relative_error(ours, theirs) < EXACT.logits
    ends = np.cumsum([len(prompt.ids) for prompt in prompts]) - 1
    assert relative_error(found[-1][0], found[0][1][ends]) < EXACT.logits
