"""Many clients on asyncio: each gets its own answer, and none holds up another."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from moevlm.runtime.core.errors import Cancelled, DeadlineExceeded, EngineError, QueueFull, RequestError
from moevlm.runtime.engine.async_engine import AsyncEngine
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.engine.scheduler import Scheduler
from moevlm.runtime.engine.step import EngineLimits
from moevlm.runtime.request.sampling import SamplingParams
from tests.support.paged_engine import PagedEngine, alone, paged_runtime, prompt_of

LIMITS = EngineLimits(8, 128, 8, 2000, 4, packed=True)
PROMPTS = [tuple(range(5 + n, 12 + 3 * n)) for n in range(8)]


def params(n: int, new_tokens: int = 20) -> SamplingParams:
    return SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=1.0, top_p=0.9, seed=n)


async def read(engine: AsyncEngine, n: int, new_tokens: int = 20, **options: Any) -> list[int]:
    made: list[int] = []
    async for piece in engine.generate(prompt_of(PROMPTS[n]), params=params(n, new_tokens), **options):
        made += piece.token_ids
    return made


def run(body: Callable[[], Awaitable[None]]) -> None:
    """For at most a minute."""
    asyncio.run(asyncio.wait_for(body(), 60))


class Gate:
    """Steps of an engine wait at it while it is closed."""

    def __init__(self, engine: PagedEngine) -> None:
        self._open, self.reached = threading.Event(), threading.Event()
        self.open()
        engine.before = self._pass

    def close(self) -> None:
        self.reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def _pass(self, *_: object) -> None:
        self.reached.set()
        assert self._open.wait(60)


@pytest.fixture
def engine() -> PagedEngine:
    return PagedEngine(LIMITS)


@pytest.fixture
def runtime(engine: PagedEngine) -> Runtime:
    return paged_runtime(engine)


def test_clients_share_steps_and_get_what_they_get_alone(engine: PagedEngine, runtime: Runtime) -> None:
    async def body() -> None:
        gate = Gate(engine)
        gate.close()
        async with AsyncEngine(runtime) as service:
            tasks = [asyncio.create_task(read(service, n)) for n in range(8)]
            while len(service._news) < 8:
                await asyncio.sleep(0.001)
            gate.open()
            assert await asyncio.gather(*tasks) == [alone(prompt, 20, params(n)) for n, prompt in enumerate(PROMPTS)]

    run(body)
    assert max(step.sequences for step in engine.steps) == 8
    assert runtime.loop.used_pages == 0


@pytest.mark.parametrize("leave", ["break", "cancel"])
def test_a_client_that_leaves_ends_its_request_alone(runtime: Runtime, leave: str) -> None:
    async def body() -> None:
        async with AsyncEngine(runtime) as service:
            stream = service.generate(prompt_of(PROMPTS[0]), params=params(0, 1000))
            other = asyncio.create_task(read(service, 1, 100))
            if leave == "break":
                assert (await anext(stream)).token_ids
                await stream.aclose()
            else:
                task = asyncio.create_task(read(service, 0, 1000))
                assert (await anext(stream)).token_ids
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await stream.aclose()
            assert await other == alone(PROMPTS[1], 100, params(1, 100))

    run(body)
    assert runtime.loop.used_pages == 0


def test_a_slow_client_waits_for_itself_alone(engine: PagedEngine, runtime: Runtime) -> None:
    async def body() -> None:
        async with AsyncEngine(runtime, ahead=3) as service:
            stream = service.generate(prompt_of(PROMPTS[0]), params=params(0, 30))
            made = [*(await anext(stream)).token_ids]
            assert await read(service, 1, 60) == alone(PROMPTS[1], 60, params(1, 60))
            (slow,) = service._news
            assert len(slow.pieces) == 3
            steps = len(engine.steps)
            made += [token for piece in [piece async for piece in stream] for token in piece.token_ids]
            assert made == alone(PROMPTS[0], 30, params(0, 30))
            assert len(engine.steps) > steps

    run(body)


def test_a_full_queue_refuses_a_request_at_once(engine: PagedEngine, runtime: Runtime) -> None:
    async def body() -> None:
        gate = Gate(engine)
        async with AsyncEngine(runtime, waiting=2) as service:
            gate.close()
            first = asyncio.create_task(read(service, 0))
            assert await asyncio.to_thread(gate.reached.wait, 60)
            others = [asyncio.create_task(read(service, n)) for n in (1, 2)]
            while len(service._news) < 3:
                await asyncio.sleep(0.001)
            with pytest.raises(QueueFull, match=r"^2 requests wait already \(allowed: 2\)$"):
                await read(service, 3)
            gate.open()
            for n, task in enumerate((first, *others)):
                assert await task == alone(PROMPTS[n], 20, params(n))

    run(body)


def test_a_deadline_ends_a_request_that_waits_and_one_that_runs(engine: PagedEngine, runtime: Runtime) -> None:
    async def body() -> None:
        gate = Gate(engine)
        async with AsyncEngine(runtime) as service:
            gate.close()
            late = [asyncio.create_task(read(service, n, 1000, deadline=0.05)) for n in range(2)]
            other = asyncio.create_task(read(service, 2))
            assert await asyncio.to_thread(gate.reached.wait, 60)
            await asyncio.sleep(0.1)
            gate.open()
            for task in late:
                with pytest.raises(DeadlineExceeded):
                    await task
            assert await other == alone(PROMPTS[2], 20, params(2))
            for wrong in (0, -1, "soon", math.nan, math.inf, 10**400):
                with pytest.raises(
                    RequestError, match=r"^unsupported value deadline = .* \(allowed: seconds, above 0 and up to .*\)$"
                ):
                    await read(service, 0, deadline=wrong)

    run(body)
    assert runtime.loop.used_pages == 0


def test_a_deadline_ends_a_request_that_its_client_does_not_read(runtime: Runtime) -> None:
    async def body() -> None:
        async with AsyncEngine(runtime, ahead=1) as service:
            stream = service.generate(prompt_of(PROMPTS[0]), params=params(0, 1000), deadline=0.2)
            assert (await anext(stream)).token_ids
            (sequence,) = service._news
            while sequence.status != "ended":
                await asyncio.sleep(0.01)
            assert runtime.loop.used_pages == 0
            with pytest.raises(DeadlineExceeded):
                while True:
                    await anext(stream)

    run(body)


def test_an_error_reaches_every_client_of_the_step(engine: PagedEngine, runtime: Runtime) -> None:
    async def body() -> None:
        def fail(*_: object) -> None:
            if len(engine.steps) > 6:
                raise EngineError("broken")

        engine.before = fail
        async with AsyncEngine(runtime) as service:
            answers = await asyncio.gather(*(read(service, n) for n in range(4)), return_exceptions=True)
            assert {str(answer) for answer in answers} == {"broken"}
            engine.before = None
            assert await read(service, 0) == alone(PROMPTS[0], 20, params(0))

    run(body)
    assert runtime.loop.used_pages == 0


def test_closing_lets_requests_end_or_cancels_them(runtime: Runtime) -> None:
    async def body() -> None:
        service = AsyncEngine(runtime)
        task = asyncio.create_task(read(service, 0))
        while not service._news and not task.done():
            await asyncio.sleep(0.001)
        await service.close(grace=None)
        assert await task == alone(PROMPTS[0], 20, params(0))
        with pytest.raises(EngineError, match="closed"):
            await read(service, 0)

        service = AsyncEngine(runtime)
        running = service.generate(prompt_of(PROMPTS[1]), params=params(1, 1900))
        assert (await anext(running)).token_ids
        await service.close()
        with pytest.raises(Cancelled, match="closed"):
            while True:
                await anext(running)

    run(body)
    assert runtime.loop.used_pages == 0
    assert threading.active_count() == 1 or not any("moevlm" in one.name for one in threading.enumerate())


def test_closing_reaches_a_client_whose_prompt_is_half_read(engine: PagedEngine) -> None:
    runtime = paged_runtime(engine, chunk_tokens=4)  # of a step that nothing stops within

    async def body() -> None:
        gate = Gate(engine)
        gate.close()
        service = AsyncEngine(runtime)
        task = asyncio.create_task(read(service, 7))
        await asyncio.to_thread(gate.reached.wait, 60)
        closing = asyncio.create_task(service.close())
        while not all(one.cancellation.cancelled for one in service._news):
            await asyncio.sleep(0.001)
        gate.open()
        with pytest.raises(Cancelled, match="closed"):
            await task
        await closing

    run(body)
    assert runtime.loop.used_pages == 0


def test_an_engine_whose_closing_is_cancelled_stops_all_the_same(runtime: Runtime) -> None:
    async def body() -> None:
        service = AsyncEngine(runtime)
        stream = service.generate(prompt_of(PROMPTS[0]), params=params(0, 1900))
        assert (await anext(stream)).token_ids
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(service.close(grace=None), 0.05)
        with pytest.raises(Cancelled, match="closed"):
            while True:
                await anext(stream)
        await service.close()
        assert not service._thread.is_alive()

    run(body)


def test_an_engine_is_of_one_event_loop(runtime: Runtime) -> None:
    async def body() -> None:
        async with AsyncEngine(runtime) as service:

            def elsewhere() -> None:
                with pytest.raises(EngineError, match="another event loop"):
                    asyncio.run(read(service, 0))

            await asyncio.to_thread(elsewhere)
            assert await read(service, 0) == alone(PROMPTS[0], 20, params(0))

    run(body)


def test_requests_whose_clients_do_not_read_leave_the_queue_to_others(engine: PagedEngine) -> None:
    runtime = paged_runtime(engine, pages=14)

    async def body() -> None:
        async with AsyncEngine(runtime, waiting=1, ahead=1) as service:
            streams = [service.generate(prompt_of(PROMPTS[n]), params=params(n)) for n in (0, 7, 6)]
            begun = [list((await anext(stream)).token_ids) for stream in streams]
            for n in (7, 6, 5):  # each takes the pages of those before it
                assert await read(service, n) == alone(PROMPTS[n], 20, params(n))
            for n, stream, made in zip((0, 7, 6), streams, begun, strict=True):
                made += [token async for piece in stream for token in piece.token_ids]
                assert made == alone(PROMPTS[n], 20, params(n))

    run(body)


def test_a_process_that_ends_while_a_step_runs_is_not_aborted(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio, time\n"
        "from tests.runtime.engine.test_async_engine import *\n"
        "engine = PagedEngine(LIMITS)\n"
        "def slow(step, cancellation):\n"
        "    with cancellation.stopping(lambda: print('stopped')):\n"
        "        while len(engine.steps) > 5 and not cancellation.cancelled:\n"
        "            time.sleep(0.001)\n"
        "engine.before = slow\n"
        "async def main():\n"
        "    service = AsyncEngine(paged_runtime(engine))\n"
        "    stream = service.generate(prompt_of(PROMPTS[0]), params=params(0))\n"
        "    await anext(stream)\n"
        "    while len(engine.steps) < 6:\n"
        "        await asyncio.sleep(0.001)\n"
        "    return stream\n"
        "stream = asyncio.new_event_loop().run_until_complete(main())\n"
        "raise SystemExit(3)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, env=environment)
    assert (ended.returncode, ended.stdout) == (3, "stopped\n"), ended.stderr


def test_a_bug_beside_the_engine_is_told_to_every_client(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise ValueError("a bug")

    async def body() -> None:
        async with AsyncEngine(runtime) as service:
            with monkeypatch.context() as patch:
                patch.setattr(Scheduler, "schedule", fail)
                answers = await asyncio.gather(*(read(service, n) for n in range(3)), return_exceptions=True)
                assert {str(answer) for answer in answers} == {"the engine failed: a bug"}
            assert await read(service, 0) == alone(PROMPTS[0], 20, params(0))

    run(body)
    assert runtime.loop.used_pages == 0


def test_threads_and_coroutines_share_a_runtime(runtime: Runtime) -> None:
    def plain(n: int) -> list[int]:
        pieces = list(runtime.generate(prompt_of(PROMPTS[n]), params=params(n)))
        return [token for piece in pieces for token in piece.token_ids]

    async def body() -> None:
        async with AsyncEngine(runtime) as service:
            answers = await asyncio.gather(
                *(read(service, n) for n in range(4)), *(asyncio.to_thread(plain, n) for n in range(4, 8))
            )
        assert answers == [alone(prompt, 20, params(n)) for n, prompt in enumerate(PROMPTS)]

    run(body)


@pytest.mark.parametrize("name", ["waiting", "ahead"])
def test_bounds_are_checked(runtime: Runtime, name: str) -> None:
    async def body() -> None:
        with pytest.raises(RequestError, match=rf"^unsupported value {name} = 0"):
            AsyncEngine(runtime, **{name: 0})

    run(body)
