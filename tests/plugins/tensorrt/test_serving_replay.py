"""A thousand random steps of a serving run on the fake device: which rows of which pages each writes, and reads.

Plugins are those of the C++ library and launch on the recording driver; numpy does what the ops are specified to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.states import PAGE_SIZE, page_bytes
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.engine.sequence import Sequence as Request
from moevlm.runtime.engine.step import Step
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from moevlm.runtime.request.sampling import SamplingParams
from tests.support.simulator.bundle import TARGET, SimulatedBundle
from tests.support.simulator.device import SimulatedGpu, simulated_gpu
from tests.support.simulator.libraries import Libraries
from tests.support.simulator.specified import SpecifiedKernels

STEPS = 1000
MOST_NEW = 120
PAGES = 16
BEGINNINGS = (
    "",
    "Be brief, be kind, and never say what was not asked for. ",
    "Be brief, be kind, and then say no more. ",
)
QUESTIONS = ("hi", "why is that so, and what follows from it?", "count to nine", "again, " * 40)


def messages(text: str, pictures: int = 0) -> list[dict[str, Any]]:
    pixels = np.random.default_rng(pictures).integers(0, 256, (pictures, 24, 32, 3), np.uint8)
    content: list[dict[str, Any]] = [{"type": "image", "image": Image.fromarray(one)} for one in pixels]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


PROMPTS = [messages(beginning + text) for beginning in BEGINNINGS for text in QUESTIONS]
PROMPTS += [messages(text, pictures) for text in BEGINNINGS for pictures in (1, 2)]


@pytest.fixture(scope="module")
def expected(simulated: SimulatedBundle) -> list[tuple[int, ...]]:
    """What each prompt is continued with."""
    params = SamplingParams(max_new_tokens=MOST_NEW, ignore_eos=True)
    with load_runtime(simulated.path, "ort-cpu", LoadOptions(threads=1)) as runtime:
        return [answer.token_ids for answer in runtime.generate_many(PROMPTS, params=params)]


class Pages:
    """What steps do to the pages of a runtime's engine."""

    def __init__(self, runtime: Runtime, gpu: SimulatedGpu) -> None:
        self.steps: list[Step] = []
        self._size = runtime.engine.limits.page_size
        self._memory = gpu.machine.memory
        self._forward = runtime.engine.forward
        self._caches = runtime.engine._decoder._kept.tensors

    def forward(self, step: Step, *rest: Any) -> Any:
        before = self._rows()
        output = self._forward(step, *rest)
        self.steps.append(step)
        allowed = np.zeros(before[0].shape[:2], bool)  # page, row
        allowed[0] = True  # padding's
        for _, target in step.copies:
            allowed[target] = True
        for table, context, tokens in zip(step.page_table, step.context_len, np.diff(step.query_start), strict=True):
            places = np.arange(context, context + tokens)
            allowed[table[places // self._size], places % self._size] = True
        for earlier, later in zip(before, self._rows(), strict=True):
            changed = (earlier != later).any(axis=2)
            assert not (changed & ~allowed).any(), "a step wrote a row of another sequence"
        return output

    def _rows(self) -> list[np.ndarray]:
        """Of each cache the bytes of every row: [page, row, bytes]."""
        found = []
        for address, shape in self._caches.values():
            size = 4 * math.prod(shape)
            pages, heads, rows, width = shape
            cache = self._memory.view(address, size).reshape(pages, heads, rows, 4 * width)
            found.append(cache.swapaxes(1, 2).reshape(pages, rows, -1).copy())
        return found


def served(runtime: Runtime, rng: np.random.Generator) -> Iterator[tuple[int, Request]]:
    """Requests that come and are cancelled at random while the engine steps; each at its end, with its prompt.

    The readers of some are slow: others take their pages.
    """
    active: list[tuple[int, Request]] = []
    for step in range(STEPS):
        while len(active) < 16 and rng.random() < 0.5:
            prompt, new = int(rng.integers(len(PROMPTS))), int(rng.integers(1, MOST_NEW + 1))
            params = SamplingParams(max_new_tokens=new, ignore_eos=True)
            request = runtime.sequence(PROMPTS[prompt], params=params, ahead=2 if rng.random() < 0.4 else math.inf)
            runtime.loop.add(request)
            active.append((prompt, request))
        if active and rng.random() < 0.02:
            active[int(rng.integers(len(active)))][1].cancellation.cancel()
        for _, request in active:
            if request.ahead == 2 and request.pieces and rng.random() < 0.4:
                runtime.loop.take(request)
        if step % 250 == 249:
            runtime.forget()
        runtime.loop.step()
        yield from (one for one in active if one[1].status == "ended")
        active = [one for one in active if one[1].status != "ended"]
    for prompt, request in active:
        request.cancellation.cancel()
        runtime.loop.step()
        yield prompt, request


def test_every_write_is_inside_its_page_and_what_is_read_was_written(
    simulated: SimulatedBundle,
    expected: Sequence[tuple[int, ...]],
    libraries: Libraries,
    tmp_path: Path,
) -> None:
    bundle, kernels = simulated.path, SpecifiedKernels(simulated.ops)
    with simulated_gpu(tmp_path, libraries, kernels) as gpu:
        states = Bundle.open(bundle).manifest.engines[TARGET].states
        memory = PAGES * page_bytes(states, PAGE_SIZE)
        with load_runtime(bundle, TARGET, LoadOptions(cache_memory=memory)) as runtime:
            pages = Pages(runtime, gpu)
            runtime.engine.forward = pages.forward
            ended = list(served(runtime, np.random.default_rng(0)))
            for prompt, request in ended:
                assert request.error is None
                assert tuple(request.generated) == expected[prompt][: len(request.generated)]
            assert runtime.loop.used_pages == 0
            assert runtime.loop._scheduler._all.preemptions > STEPS // 10
        assert not gpu.gpu.held()
    steps, driver = pages.steps, gpu.gpu.driver
    assert sum(request.finished for _, request in ended) > 60
    assert len(steps) > 0.9 * STEPS
    assert {step.sequences for step in steps} >= set(range(1, 8))
    assert sum(bool(step.copies) for step in steps) > 30
    assert driver.replays == sum(step.sequences == step.tokens for step in steps)
    assert driver.faults.calls.count("cuStreamBeginCapture") == len((1, 2, 4, 8))
