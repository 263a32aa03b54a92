"""A sequence's numbers have the same bits whatever else is in its steps, and wherever its pages lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moevlm.export.build import build
from moevlm.runtime.backends.base import EngineOptions
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.loading import load_engine
from tests.support.packed_steps import Kept, reserved
from tests.support.tiny import TinyCheckpoint

DEMO = Path(__file__).parents[4] / "demo/checkpoint"
TARGETS = ("cpu:int8", "cpu:int4")
LONGEST = 150  # tokens


@pytest.fixture(scope="module", params=["demo", "recurrent states"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo; and layers whose states are rows, beside one of attention."""
    folder = tmp_path_factory.mktemp("rows")
    hybrid = TinyCheckpoint("qwen3_5_moe", text={"num_hidden_layers": 4, "layer_types": None})
    checkpoint = DEMO if request.param == "demo" else hybrid.save(folder / "checkpoint")
    return build(checkpoint, folder / "rows.moevlm", TARGETS)


@pytest.fixture(scope="module", params=TARGETS)
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Engine]:
    loaded = load_engine(bundle, request.param, EngineOptions(threads=2))
    assert loaded.limits.packed
    yield loaded
    loaded.close()


def steps_of(draw: st.DrawFn, sizes: list[int], prompts: list[int], page: int) -> list[dict[int, int]]:
    """Tokens of each sequence in each step: prompts cut at multiples of a page, then one token at a time."""
    done, steps = [0] * len(sizes), []
    while any(a < b for a, b in zip(done, sizes, strict=True)):
        waiting = [n for n, size in enumerate(sizes) if done[n] < size]
        chosen = draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        step = {}
        for n in chosen:
            left = prompts[n] - done[n]
            pages = draw(st.integers(1, 3))
            step[n] = min(pages * page, left) if left > 0 else 1
            done[n] += step[n]
        steps.append(step)
    return steps


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int, int]:
    """Token ids of each sequence, how many are its prompt, and two seeds: of the order of pages, and of the steps."""
    count = draw(st.integers(2, 5))
    prompts = [draw(st.sampled_from((1, 7, 63, 64, 65, 128, 140)) | st.integers(1, LONGEST - 4)) for _ in range(count)]
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    ids = [rng.integers(8, 60, prompt + draw(st.integers(0, 4))).tolist() for prompt in prompts]
    return ids, prompts, draw(st.integers(0, 99)), draw(st.integers(0, 99))


def alone(engine: Engine, bundle: Bundle, ids: list[int], prompt: int, seed: int) -> np.ndarray:
    """The prompt in one step, then a token at a time."""
    kept = reserved(engine, bundle.manifest.model, 1, LONGEST, seed)
    return np.concatenate([kept.run(ids[:prompt]), *(kept.run([token]) for token in ids[prompt:])])


def together(kept: Kept, ids: list[list[int]], steps: list[dict[int, int]]) -> list[np.ndarray]:
    """Logits of all tokens of each sequence."""
    parts: list[list[np.ndarray]] = [[] for _ in ids]
    for step in steps:
        places = {n: kept.lengths[n] for n in step}
        logits = kept.run({n: ids[n][places[n] : places[n] + size] for n, size in step.items()})
        for n, rows in zip(step, np.split(logits, np.cumsum(list(step.values()))[:-1]), strict=True):
            parts[n].append(rows)
    return [np.concatenate(rows) for rows in parts]


@settings(max_examples=25, deadline=None)
@given(mixture=mixtures(), data=st.data())
def test_a_sequence_in_any_mixture_has_the_bits_that_it_has_alone(
    mixture: tuple[list[list[int]], list[int], int, int], data: st.DataObject, engine: Engine, bundle: Bundle
) -> None:
    ids, prompts, first, second = mixture
    steps = steps_of(data.draw, [len(own) for own in ids], prompts, engine.limits.page_size)
    expected = [alone(engine, bundle, own, prompt, first) for own, prompt in zip(ids, prompts, strict=True)]
    kept = reserved(engine, bundle.manifest.model, len(ids), LONGEST, second)
    for n, (ours, theirs) in enumerate(zip(together(kept, ids, steps), expected, strict=True)):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"sequence {n} of {steps}")
