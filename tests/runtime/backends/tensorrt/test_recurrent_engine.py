"""Recurrent states in the engine on TensorRT, on a fake GPU that evaluates the canonical graphs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moevlm.export.build import build
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.states import page_bytes, row_bytes
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from tests.support.bundles import edit_manifest
from tests.support.fakes.gpu import LIMITS, TARGET, FakeGpu, gpu_bundle
from tests.support.packed_steps import Kept
from tests.support.tiny import TinyCheckpoint

PROMPTS = ("hi", "a prompt of several chunks, so it is read in parts", "third", "the fourth of them")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recurrent")
    checkpoint = TinyCheckpoint("qwen3_5_moe", side_files=True).save(folder / "checkpoint")
    return gpu_bundle(build(checkpoint, folder / "b.moevlm", ["reference"]).directory, folder)


def answers(runtime: Runtime, prompts: tuple[str, ...], tokens: int) -> list[tuple[int, ...]]:
    requests = [[{"role": "user", "content": prompt}] for prompt in prompts]
    done = runtime.generate_many(requests, max_new_tokens=tokens, ignore_eos=True)
    return [tuple(one.token_ids) for one in done]


def test_requests_together_get_the_tokens_of_the_reference_engine(runtime: Runtime, bundle: Path) -> None:
    expected = answers(load_runtime(bundle, "reference", LoadOptions(threads=1)), PROMPTS, 12)
    assert len(set(expected)) == len(PROMPTS)
    assert answers(runtime, PROMPTS, 12) == expected
    assert runtime.engine.graphs == "replayed"
    assert answers(runtime, PROMPTS[:2], 12) == expected[:2]  # in rows that others have had


def test_a_copied_row_continues_its_sequence(runtime: Runtime) -> None:
    engine, ids = runtime.engine, range(3, 13)
    engine.reserve(4, 4)
    kept = Kept(engine, runtime.model, [0, 0], [[1], [2]])
    engine.forward(replace(kept.step({0: ids[:6]}), cleared=(1,)))
    kept.lengths = [6, 6]
    copied = engine.forward(replace(kept.step({1: ids[6:]}), copies=((1, 2),), row_copies=((1, 2),)))
    copied_logits = [copied.logits(i) for i in range(4)]
    straight = engine.forward(kept.step({0: ids[6:]}))  # its own row is as it was
    for i in range(4):
        np.testing.assert_allclose(copied_logits[i], straight.logits(i), atol=1e-5)


def test_a_row_that_was_not_cleared_is_noticed(runtime: Runtime) -> None:
    runtime.engine.reserve(3, 3)
    step = Kept(runtime.engine, runtime.model, [0], [[1]]).step({0: [5, 6]})
    with pytest.raises(AssertionError, match="a row was neither cleared nor written"):
        runtime.engine.forward(step)


def test_rows_of_a_step_and_of_the_pool_are_checked(runtime: Runtime) -> None:
    engine = runtime.engine
    with pytest.raises(EngineError, match=r"unsupported value rows = 1 \(allowed: 2 or more\)"):
        engine.reserve(3, 1)
    with pytest.raises(EngineError, match=rf"unsupported value rows = 81 \(allowed: up to {LIMITS['max_rows']}\)"):
        engine.reserve(3, 81)
    engine.reserve(3, 3)
    step = replace(Kept(engine, runtime.model, [0], [[1]]).step({0: [5]}), cleared=(3,))
    with pytest.raises(EngineError, match=r"cleared has 3 \(allowed: 1 to 2\)"):
        engine.forward(step)


def test_memory_is_for_pages_and_rows(runtime: Runtime) -> None:
    states = runtime.engine.states
    most = LIMITS["max_pages"] * page_bytes(states) + LIMITS["max_rows"] * row_bytes(states)
    assert runtime.engine.limits.cache_memory == most


def test_an_engine_with_other_rows_than_the_manifest_says_is_refused(
    bundle: Path, gpu: FakeGpu, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy.moevlm"))

    def widen(manifest: dict) -> None:
        (state,) = [s for s in manifest["engines"][TARGET]["states"] if s.get("name") == "conv"]
        state["shape"][1] += 1

    edit_manifest(copy, widen)
    with pytest.raises(
        EngineError, match=r"decoder.plan has conv_state.\d FLOAT \(-1, 3, 96\), manifest.json says FLOAT"
    ):
        load_runtime(copy, TARGET)
    assert not gpu.held()
