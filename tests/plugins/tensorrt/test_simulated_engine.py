"""The whole engine without a GPU: build, runtime, CUDA calls, plugins and kernels, against the engine of the CPU.

Every access of a kernel is watched: nothing outside of what is allocated, nothing read that was not written, no two
programs of a launch that meet without atomics.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevlm.runtime.backends.tensorrt.kernel_resources import KERNELS
from tests.support.simulator.bundle import SimulatedBundle
from tests.support.simulator.run import Report, cpu_answers

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
def report(simulated: SimulatedBundle, interpreted: Callable[..., Report]) -> Report:
    return interpreted(simulated, REQUESTS, NEW_TOKENS)


def test_eight_requests_at_once_get_the_tokens_of_the_cpu(simulated: SimulatedBundle, report: Report) -> None:
    expected = cpu_answers(simulated.path, "ort-cpu", REQUESTS, NEW_TOKENS)
    assert len({answer.token_ids for answer in expected}) > len(REQUESTS) // 2
    report.assert_answers(expected)


def test_steps_were_shared_recorded_and_given_back(report: Report) -> None:
    assert max(sequences for _, sequences in report.steps) == len(REQUESTS)
    assert (report.graphs, report.replays) == ("replayed", report.decodes)
    assert not report.held


SORTS_MANY_ROWS = {"count_rows", "start_rows", "place_rows"}  # of more tokens than a step here has


def test_every_kernel_of_the_engine_ran(simulated: SimulatedBundle, report: Report) -> None:
    folder = simulated.path / "engines" / "rtx-sm89-fp16"
    built = {kernel["kernel"] for op in json.loads((folder / KERNELS).read_text()) for kernel in op["kernels"]}
    assert set(report.launches) == built - SORTS_MANY_ROWS
