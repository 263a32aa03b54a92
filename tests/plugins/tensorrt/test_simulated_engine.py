"""The whole engine without a GPU: build, runtime, CUDA calls, plugins and kernels, against the engine of the CPU.

Every access of a kernel is watched: nothing outside of what is allocated, nothing read that was not written, no two
programs of a launch that meet without atomics.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevlm.runtime.backends.tensorrt.kernel_resources import KERNELS
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from moevlm.runtime.request.sampling import SamplingParams
from tests.plugins.gpu.interpreter import Interpreter
from tests.support.simulator.bundle import TARGET, SimulatedBundle
from tests.support.simulator.libraries import Libraries
from tests.support.simulator.run import Report, interpret

NEW_TOKENS = 6


def picture(width: int, height: int, seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


def request(text: str, *pictures: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


REQUESTS = [
    request("hi"),
    request("one", picture(16, 24, 1)),
    request("longer than a page of sixty-four tokens, and so it is read in parts"),
    request("two", picture(24, 16, 2), picture(16, 16, 3)),
    request("five"),
    request("one more", picture(16, 24, 1)),
    request("seven"),
    request("8"),
]


@pytest.fixture(scope="module")
def report(
    simulated: SimulatedBundle,
    libraries: Libraries,
    triton_interpreter: Interpreter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Report:
    """Of all requests at once."""
    folder = tmp_path_factory.mktemp("gpu")
    return triton_interpreter.call(interpret, simulated.path, TARGET, folder, libraries, REQUESTS, NEW_TOKENS)


def test_eight_requests_at_once_get_the_tokens_of_the_cpu(simulated: SimulatedBundle, report: Report) -> None:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2)
    with load_runtime(simulated.path, "ort-cpu", LoadOptions(threads=1)) as runtime:
        expected = runtime.generate_many(REQUESTS, params=params)
    assert len({answer.token_ids for answer in expected}) > len(REQUESTS) // 2
    for got, want in zip(report.answers, expected, strict=True):
        assert got.token_ids == want.token_ids
        for one, other in zip(got.sampled, want.sampled, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_steps_were_shared_recorded_and_given_back(report: Report) -> None:
    assert max(sequences for _, sequences in report.steps) == len(REQUESTS)
    decodes = [tokens for tokens, sequences in report.steps if tokens == sequences]
    assert (report.graphs, report.replays) == ("replayed", len(decodes))
    assert not report.held


SORTS_MANY_ROWS = {"count_rows", "start_rows", "place_rows"}  # of more tokens than a step here has


def test_every_kernel_of_the_engine_ran(simulated: SimulatedBundle, report: Report) -> None:
    folder = simulated.path / "engines" / "rtx-sm89-fp16"
    built = {kernel["kernel"] for op in json.loads((folder / KERNELS).read_text()) for kernel in op["kernels"]}
    assert set(report.launches) == built - SORTS_MANY_ROWS
