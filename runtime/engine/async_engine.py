"""Many clients of one runtime on asyncio: one thread steps the engine, every client reads its own pieces."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Items
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, Unpack

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import Cancelled, EngineError, require_positive
from moevlm.runtime.engine.answer import Piece
from moevlm.runtime.engine.sequence import Sequence
from moevlm.runtime.request.sampling import SamplingOptions, SamplingParams

if TYPE_CHECKING:
    from moevlm.runtime.engine.generate import Runtime
    from moevlm.runtime.request.messages import Message
    from moevlm.runtime.request.prompt import Prompt


class AsyncEngine:
    """Serves a runtime to the coroutines of one event loop, in which it is made and closed.

    async with AsyncEngine(runtime) as engine:
        async for piece in engine.generate(messages):
            ...

    A client that reads slowly finds at most `ahead` pieces waiting: its request is left out of further steps until
    it reads, and if others need its pages, computed again afterwards. The runtime stays the caller's to close.
    """

    def __init__(self, runtime: Runtime, *, waiting: int = defaults.WAITING, ahead: int = defaults.AHEAD) -> None:
        """waiting: the most requests that wait for their first token. ahead: the most pieces that wait for a client."""
        require_positive("waiting", waiting)
        require_positive("ahead", ahead)
        self._runtime, self._waiting, self._ahead = runtime, waiting, ahead
        self._events = asyncio.get_running_loop()
        self._news: dict[Sequence, asyncio.Event] = {}  # of all sequences that are read
        self._empty = asyncio.Event()
        self._empty.set()
        self._closed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=runtime.loop.serve, args=(self._stop,), name="moevlm engine", daemon=True
        )
        self._thread.start()
        atexit.register(self._end)  # a thread that is within the engine when the process ends aborts it

    async def generate(
        self,
        messages: Items[Message] | Prompt,
        *,
        params: SamplingParams | None = None,
        template_options: Mapping[str, Any] | None = None,
        max_image_tokens: int | None = None,
        deadline: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of an answer, as `Runtime.generate` yields them; closing the iterator or cancelling its task ends it.

        deadline: seconds from now, up to 1e9, after which DeadlineExceeded is raised. Images are decoded in a thread.
        Raises RequestError, QueueFull, EngineError, and Cancelled if the engine is closed meanwhile.
        """
        self._require_open()
        sequence = await asyncio.to_thread(
            self._runtime.sequence,
            messages,
            params=params,
            template_options=template_options,
            max_image_tokens=max_image_tokens,
            ahead=self._ahead,
            deadline=deadline,
            **options,
        )
        self._require_open()
        sequence.listener = self._told
        self._runtime.loop.add(sequence, self._waiting)
        self._news[sequence] = news = asyncio.Event()
        self._empty.clear()
        last = None
        try:
            while True:
                ended = sequence.status == "ended"  # before its pieces are looked at: there are none after it
                while sequence.pieces:
                    last = self._runtime.loop.take(sequence)
                    yield last
                if ended:
                    break
                await news.wait()
                news.clear()
            if sequence.error is not None:
                raise sequence.error
            if last is None or last.finish_reason is None:
                raise Cancelled("the engine was closed")
        finally:
            sequence.cancellation.cancel()
            self._runtime.loop.wake()
            del self._news[sequence]
            if not self._news:
                self._empty.set()

    async def close(self, grace: float | None = 0) -> None:
        """Take no more requests, give those that run `grace` seconds to end (None: any time), and cancel the rest."""
        self._closed = True
        try:
            await asyncio.wait_for(self._empty.wait(), grace)
        except TimeoutError:
            pass
        finally:  # the task that closes may have been cancelled itself
            self._cancel()
        await asyncio.to_thread(self._end)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _cancel(self) -> None:
        """End all requests, then the thread."""
        for sequence in tuple(self._news):
            sequence.cancellation.cancel()
        self._stop.set()  # the thread ends what was cancelled before it stops
        self._runtime.loop.wake()

    def _end(self) -> None:
        """Return when the thread has ended."""
        self._cancel()
        self._thread.join()
        atexit.unregister(self._end)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("this engine was closed")
        if asyncio.get_running_loop() is not self._events:
            raise EngineError("this engine was made in another event loop (allowed: one engine for each)")

    def _told(self, sequences: Items[Sequence]) -> None:
        """From the thread that steps: these have a piece more, or have ended."""
        with suppress(RuntimeError):  # the event loop was closed, and nobody is left to be told
            self._events.call_soon_threadsafe(self._wake, sequences)

    def _wake(self, sequences: Items[Sequence]) -> None:
        for sequence in sequences:
            if sequence in self._news:
                self._news[sequence].set()
