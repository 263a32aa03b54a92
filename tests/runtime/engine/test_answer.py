"""Ending an answer from outside: between steps, within a step, from other threads and from signal handlers."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.runtime import load
from moevlm.runtime.core.errors import Cancelled
from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.engine.answer import Answer
from moevlm.runtime.engine.async_engine import AsyncEngine
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.request.vision_inputs import VisionInputs, pack
from tests.runtime.engine.test_generate import TWO_IMAGES, ToyEngine, _free, _ids, _runtime, _text

ROOT = Path(__file__).parents[3]


class Hooked(ToyEngine):
    """Calls a function at the start of each step and of each call for images."""

    hook: Callable[[], object] = staticmethod(lambda: None)

    def encode(self, *arguments):
        self.hook()
        return super().encode(*arguments)

    def forward(self, *arguments):
        self.hook()
        return super().forward(*arguments)


class Waiting(ToyEngine):
    """Each step lasts until it is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()

    def forward(self, *arguments):
        cancellation: Cancellation = arguments[-1]
        ended = threading.Event()
        with cancellation.stopping(ended.set):
            self.entered.set()
            assert ended.wait(60)
            cancellation.check()


def is_free(engine: ToyEngine) -> bool:
    assert engine.owner is not None
    return _free(engine.owner)


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_a_running_step_is_stopped_by_another_thread(end: str) -> None:
    engine = Waiting()
    answer = _runtime(engine).generate(_text("hi"))
    with ThreadPoolExecutor(1) as reader:
        pieces = reader.submit(list, answer)
        assert engine.entered.wait(60)
        getattr(answer, end)()
        assert pieces.result(60) == []
    assert is_free(engine)
    assert list(answer) == []


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_prompt_is_left_between_its_chunks(steps: int) -> None:
    engine = Hooked()
    runtime = _runtime(engine, chunk_tokens=4)
    answer = runtime.generate(_text("a prompt of several chunks"))
    engine.hook = lambda: len(engine.steps) == steps - 1 and answer.cancel()  # as a signal handler: in the same thread
    assert list(answer) == []
    assert len(engine.steps) == steps
    assert is_free(engine)


def test_images_are_left_between_calls_of_the_vision_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moevlm.runtime.engine.image_features.ENCODED_PATCHES", 24)
    engine = Hooked()
    runtime = _runtime(engine)
    answer = runtime.generate(TWO_IMAGES)
    engine.hook = answer.cancel
    assert list(answer) == []
    assert len(engine.encoded) == 1
    assert engine.steps == []


def test_images_in_several_calls_are_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _runtime(engine := ToyEngine())
    prompts = [runtime.prompt(TWO_IMAGES), runtime.prompt(TWO_IMAGES)]
    together = runtime.encode(prompts)
    for most, calls in ((40, 2), (24, 4), (1, 4)):
        monkeypatch.setattr("moevlm.runtime.engine.image_features.ENCODED_PATCHES", most)
        engine.encoded.clear()
        apart = runtime.encode(prompts)
        assert len(engine.encoded) == calls
        for mine, theirs in zip(apart, together, strict=True):
            np.testing.assert_array_equal(mine.to_host().embeds, theirs.to_host().embeds)
            assert mine.to_host().deepstack.shape == theirs.to_host().deepstack.shape


def test_an_answer_that_nobody_reads_is_closed_at_once() -> None:
    for end in (Answer.cancel, Answer.close, lambda answer: answer.__exit__(None, None, None)):
        engine = ToyEngine()
        answer = _runtime(engine).generate(_text("hi"))
        next(answer)
        assert not is_free(engine)
        end(answer)
        assert is_free(engine)
        assert list(answer) == []
        end(answer)


def test_an_answer_in_a_with_statement_is_closed_when_it_is_left() -> None:
    engine = ToyEngine()
    with pytest.raises(ZeroDivisionError), _runtime(engine).generate(_text("hi")) as answer:
        next(answer)
        raise ZeroDivisionError
    assert is_free(engine)


def test_usage_so_far_of_an_answer_that_was_cancelled() -> None:
    runtime = _runtime(engine := Hooked())
    answer = runtime.generate(TWO_IMAGES, max_new_tokens=50)
    size = len(runtime.prompt(TWO_IMAGES).ids)
    assert (answer.usage.prompt_tokens, answer.usage.image_tokens, answer.usage.new_tokens) == (size, 10, 0)
    assert answer.usage.vision_seconds == answer.usage.prefill_seconds == 0
    next(answer)
    assert answer.usage.new_tokens == 1
    assert answer.usage.prefill_seconds > 0 == answer.usage.decode_seconds
    engine.hook = lambda: len(engine.steps) == 4 and answer.cancel()
    assert len(list(answer)) == 3
    assert answer.usage.new_tokens == 5  # that of the step in which it was cancelled was made, and counts
    assert answer.usage.decode_seconds > 0


def test_usage_of_a_whole_answer_is_that_of_its_last_piece() -> None:
    answer = _runtime().generate(TWO_IMAGES, max_new_tokens=5)
    assert list(answer)[-1].usage == answer.usage


def test_cancelling_one_request_leaves_others_alone() -> None:
    runtime = _runtime()
    expected = _ids(list(_runtime().generate(_text("you"), max_new_tokens=8)))
    one, other = runtime.generate(_text("hi")), runtime.generate(_text("you"), max_new_tokens=8)
    ids = [*next(one).token_ids, *next(other).token_ids][1:]
    one.cancel()
    assert ids + _ids(list(other)) == expected


def documented_client() -> Callable[[AsyncEngine, str], Coroutine[Any, Any, str]]:
    """The function that docs/service.md shows for a client."""
    code = re.search(
        r"```python\n(import asyncio\n.*?)async def main", (ROOT / "docs/service.md").read_text(), re.DOTALL
    )
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names["client"]


def test_a_client_that_leaves_ends_the_step_that_runs() -> None:
    engine, ask = Waiting(), documented_client()

    async def served() -> None:
        async with AsyncEngine(_runtime(engine)) as service:
            client = asyncio.create_task(ask(service, "hi"))
            assert await asyncio.to_thread(engine.entered.wait, 60)
            client.cancel()
            with pytest.raises(asyncio.CancelledError):
                await client

    asyncio.run(served())
    assert is_free(engine)


def test_the_documented_lines_for_a_service_give_the_whole_answer() -> None:
    async def served() -> str:
        async with AsyncEngine(_runtime()) as service:
            return await documented_client()(service, "hi")

    expected = "".join(piece.text for piece in _runtime().generate(_text("hi"), seed=1))
    assert asyncio.run(served()) == expected != ""


# ONNX Runtime.


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Runtime:
    return load(tiny_bundle, "ort-cpu", chunk_tokens=16)


def many_patches(vision: GridTower, side: int) -> VisionInputs:
    width = vision.channels * vision.temporal_patch_size * vision.patch_size**2
    return pack(np.zeros((side * side, width), np.float32), [(side, side)], vision)


def cancelled_soon_after_it_started(runtime: Runtime, inputs: VisionInputs) -> bool:
    class Soon(Cancellation):
        @contextmanager
        def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
            with super().stopping(stop):
                threading.Timer(0.01, self.cancel).start()
                yield

    try:
        runtime.engine.encode(inputs, Soon())
    except Cancelled:
        return True
    return False


def test_onnxruntime_stops_within_a_step_and_answers_as_before(runtime: Runtime) -> None:
    question = _text("What is in this picture?")
    before = _ids(list(runtime.generate(question, max_new_tokens=6)))
    inputs = many_patches(runtime.model.vision, 64)
    # A call that comes to its end returns. On a busy machine it may, before it is cancelled.
    assert any(cancelled_soon_after_it_started(runtime, inputs) for _ in range(20))
    assert _ids(list(runtime.generate(question, max_new_tokens=6))) == before


def test_onnxruntime_starts_nothing_for_a_request_that_was_cancelled(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    forward = runtime.engine.forward
    monkeypatch.setattr(runtime.engine, "forward", lambda *call: (calls.append(call), forward(*call))[1])
    assert list(runtime.generate(_text("hi"), max_new_tokens=2))
    step, visual, _ = calls[0]
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        forward(step, visual, cancellation)
    with pytest.raises(Cancelled):
        runtime.engine.encode(many_patches(runtime.model.vision, 2), cancellation)
