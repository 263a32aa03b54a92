"""Requests in a crowd on real engines: what each says alone, whoever shares its steps and whatever is known before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevlm.runtime import AsyncEngine, Runtime, SamplingParams, load
from moevlm.runtime.core.errors import Cancelled, DeadlineExceeded, EngineError, RequestError
from moevlm.runtime.core.states import PAGE_SIZE, page_bytes, row_bytes
from moevlm.runtime.engine.answer import Completion, Piece
from moevlm.runtime.engine.pool_size import SEQUENCES
from moevlm.runtime.engine.residents import PROMPT_TAIL

QUESTIONS = [
    "hi",
    "What is this?",
    "a longer question, to be read in two chunks " * 3,
    "count",
    "no",
    "yes",
    "why",
    "b",
]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 24, 3), np.uint8))


def messages(n: int) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": QUESTIONS[n]}]
    if n % 3 == 1:
        content.insert(0, {"type": "image", "image": picture(n % 2)})
    return [{"role": "system", "content": "Be brief, be kind, and never say what was not asked for."}, user(content)]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def params(n: int, new_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=1.0, top_p=0.9, seed=n, logprobs=2)


TARGETS = ["cpu:int8", "reference", "ort-cpu"]


@pytest.fixture(scope="module")
def bundles(
    hybrid_family: None,  # noqa: ARG001 - which it registers
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """attention: layers of attention alone. recurrent: other layers with recurrent states, too."""
    from moevlm.export.build import build
    from tests.support import hybrid

    root = tmp_path_factory.mktemp("served")
    checkpoints = {"attention": tiny_checkpoint, "recurrent": hybrid.save(root / "hybrid")}
    return {name: build(given, root / f"{name}.moevlm", TARGETS).directory for name, given in checkpoints.items()}


@pytest.fixture(
    scope="module", params=[(model, target) for model in ("attention", "recurrent") for target in TARGETS], ids=" ".join
)
def runtime(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Iterator[Runtime]:
    model, target = request.param
    with load(bundles[model], target, chunk_tokens=64) as loaded:
        yield loaded


@pytest.fixture
def alone(runtime: Runtime) -> list[Completion]:
    """Each answer by itself, with nothing known before."""
    answers = []
    for n in range(8):
        runtime.forget()
        answers.append(Completion.of(list(runtime.generate(messages(n), params=params(n)))))
    runtime.forget()
    return answers


def assert_same(runtime: Runtime, got: Completion, expected: Completion) -> None:
    """Every bit where rows do not depend on the step, else the same text."""
    assert got.token_ids == expected.token_ids
    assert got.text == expected.text
    if runtime.engine.limits.packed:
        assert got.sampled == expected.sampled
    for one, other in zip(got.sampled, expected.sampled, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_eight_at_once_say_what_each_says_alone(runtime: Runtime, alone: list[Completion]) -> None:
    together = runtime.generate_many([messages(n) for n in range(8)], params=[params(n) for n in range(8)])
    for got, expected in zip(together, alone, strict=True):
        assert_same(runtime, got, expected)
    assert runtime.loop.used_pages == 0


def test_eight_clients_get_what_each_gets_alone(runtime: Runtime, alone: list[Completion]) -> None:
    async def read(service: AsyncEngine, n: int) -> Completion:
        return Completion.of([piece async for piece in service.generate(messages(n), params=params(n))])

    async def serve() -> list[Completion]:
        async with AsyncEngine(runtime) as service:
            return await asyncio.gather(*(read(service, n) for n in range(8)))

    for got, expected in zip(asyncio.run(serve()), alone, strict=True):
        assert_same(runtime, got, expected)


def test_what_is_known_of_a_prompt_changes_nothing_in_the_answer(runtime: Runtime, alone: list[Completion]) -> None:
    for expected, n in [(alone[n], n) for n in range(8)] * 2:
        assert_same(runtime, Completion.of(list(runtime.generate(messages(n), params=params(n)))), expected)
    turns = [*messages(2), {"role": "assistant", "content": alone[2].text}, user("and then?")]
    known = Completion.of(list(runtime.generate(turns, params=params(3))))
    runtime.forget()
    assert_same(runtime, known, Completion.of(list(runtime.generate(turns, params=params(3)))))


@pytest.mark.parametrize(("model", "apart"), [("attention", 0), ("recurrent", PAGE_SIZE + PROMPT_TAIL)])
def test_a_second_turn_reads_what_is_new(
    model: str, apart: int, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*messages(2), user("and more of it, much more. " * 5)]
    with load(bundles[model], "cpu:int8") as runtime:
        tokens: list[int] = []
        forward = runtime.engine.forward
        monkeypatch.setattr(
            runtime.engine, "forward", lambda step, *rest: (tokens.append(step.tokens), forward(step, *rest))[1]
        )
        first = Completion.of(list(runtime.generate(asked, params=params(2))))
        read = len(runtime.prompt(asked).ids)
        assert sum(tokens) == read + 11
        # The end of the answer that the template writes, the question, and the beginning of the next answer. The text
        # of the answer is made of other tokens; recurrent states are known at the end of a page before it.
        turns = [*asked, {"role": "assistant", "content": first.text}, user("more")]
        tokens.clear()
        assert list(runtime.generate(turns, max_new_tokens=1))
        assert sum(tokens) < len(runtime.prompt(turns).ids) - read + 12 + apart


def test_a_small_cache_makes_requests_wait_and_start_again_but_changes_no_answer(
    runtime: Runtime, alone: list[Completion], bundles: dict[str, Path]
) -> None:
    longest = max(len(runtime.prompt(messages(n)).ids) for n in range(8)) + 12
    page, states = runtime.engine.limits.page_size, runtime.engine.states
    row = row_bytes(states)
    memory = (1 + -(-longest // page)) * page_bytes(states, page) + (1 + 2 * SEQUENCES) * row
    with load(
        bundles["recurrent" if row else "attention"], runtime.target, cache_memory=memory, chunk_tokens=64
    ) as small:
        together = small.generate_many([messages(n) for n in range(8)], params=[params(n) for n in range(8)])
        for got, expected in zip(together, alone, strict=True):
            assert_same(small, got, expected)


def test_leaving_a_crowd_ends_one_answer_alone(runtime: Runtime, alone: list[Completion]) -> None:
    answers = [runtime.generate(messages(n), params=params(n)) for n in range(4)]
    pieces: list[list[Piece]] = [[next(answer)] for answer in answers]
    answers[1].cancel()
    for n in (0, 2, 3):
        assert_same(runtime, Completion.of(pieces[n] + list(answers[n])), alone[n])
    assert list(answers[1]) == []
    assert runtime.loop.used_pages == 0


def test_an_error_ends_the_requests_of_its_step(
    runtime: Runtime, alone: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, steps = runtime.engine.forward, 0

    def failing(step: Any, *rest: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 9:
            raise EngineError("the machine is on fire")
        return forward(step, *rest)

    async def read(service: AsyncEngine, n: int) -> Completion | EngineError:
        try:
            return Completion.of([piece async for piece in service.generate(messages(n), params=params(n))])
        except EngineError as error:
            return error

    async def serve() -> list[Completion | EngineError]:
        async with AsyncEngine(runtime) as service:
            return await asyncio.gather(*(read(service, n) for n in range(4)))

    monkeypatch.setattr(runtime.engine, "forward", failing)
    ended = asyncio.run(serve())
    assert any(isinstance(one, EngineError) for one in ended)
    assert runtime.loop.used_pages == 0
    for n, one in enumerate(ended):
        if isinstance(one, Completion):
            assert_same(runtime, one, alone[n])
    assert_same(runtime, runtime.generate_many([messages(0)], params=params(0))[0], alone[0])


def test_a_client_that_leaves_and_one_that_is_late(runtime: Runtime, alone: list[Completion]) -> None:
    async def serve() -> Completion:
        async with AsyncEngine(runtime) as service:
            leaving = service.generate(messages(0), params=params(0, 400))
            late = service.generate(messages(1), params=params(1, 400), deadline=0.05)
            staying = service.generate(messages(2), params=params(2))
            await anext(leaving)
            await leaving.aclose()
            with pytest.raises(DeadlineExceeded):
                while True:
                    await anext(late)
            return Completion.of([piece async for piece in staying])

    assert_same(runtime, asyncio.run(serve()), alone[2])
    assert runtime.loop.used_pages == 0


def test_a_deadline_in_seconds_ends_plain_answers_too(runtime: Runtime) -> None:
    with pytest.raises(DeadlineExceeded):
        list(runtime.generate(messages(0), params=params(0, 400), deadline=0.05))
    with pytest.raises(DeadlineExceeded):
        runtime.generate_many([messages(0), messages(1)], params=params(0, 400), deadline=0.05)
    for wrong in (0, -1, float("nan"), "1", True):
        with pytest.raises(RequestError, match=r"^unsupported value deadline = "):
            runtime.generate(messages(0), deadline=wrong)
    assert len(runtime.generate_many([messages(0)], params=params(0), deadline=60)[0].token_ids) > 0
    assert runtime.loop.used_pages == 0


def test_closing_the_service_cancels_what_runs(runtime: Runtime) -> None:
    async def serve() -> None:
        service = AsyncEngine(runtime)
        stream = service.generate(messages(0), params=params(0, 400))
        await anext(stream)
        await service.close()
        with pytest.raises(Cancelled):
            while True:
                await anext(stream)

    asyncio.run(serve())
    assert runtime.loop.used_pages == 0


def test_an_image_that_comes_again_is_not_encoded_again(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    encode = runtime.engine.encode

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return encode(*arguments)

    monkeypatch.setattr(runtime.engine, "encode", counting)
    runtime.forget()
    other = [user([{"type": "text", "text": "Here is another: "}, {"type": "image", "image": picture(5)}])]
    texts = [Completion.of(list(runtime.generate(other, max_new_tokens=6))).text for _ in range(2)]
    assert calls == 1
    assert texts[0] == texts[1]
    assert list(runtime.generate([*other, user("And?")], max_new_tokens=2))
    assert calls == 1
