"""Steps of a whole runtime on the fake GPU that evaluates the canonical graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from tests.support.fakes.gpu import TARGET, fake_gpu

TOKENS = 3  # decoded behind each request


def assert_steps_are_those_of_reference(directory: Path, requests: list[list[dict[str, Any]]], folder: Path) -> None:
    """Logits on the fake GPU, of all requests at once and then of a token each, are those of target `reference`.

    directory: of `gpu_bundle`, made in `folder`.
    """
    forced = np.random.default_rng(5).integers(7, 90, (TOKENS, len(requests)))

    def logits(runtime: Runtime) -> list[np.ndarray]:
        prompts = [runtime.prompt(request) for request in requests]
        limits = BatchLimits.of(prompts, runtime.engine.limits, TOKENS)
        batch = Batch(runtime.engine, runtime.model, prompts, runtime.encode(prompts), limits)
        return [batch.prefill(), *(batch.decode(list(tokens)) for tokens in forced)]

    with load_runtime(directory, "reference", LoadOptions(threads=1)) as runtime:
        expected = logits(runtime)
    with fake_gpu(folder), load_runtime(directory, TARGET) as runtime:
        found = logits(runtime)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
