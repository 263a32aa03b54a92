"""The answer to one request, streamed: pieces of text, what it has cost so far, and how any thread ends it."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from moevlm.runtime.core.errors import Cancelled
from moevlm.runtime.engine.cancellation import Cancellation

if TYPE_CHECKING:
    from moevlm.runtime.request.sampler import Sampled

FinishReason = Literal["stop", "length"]
Phase = Literal["vision_seconds", "prefill_seconds", "decode_seconds"]


@dataclass(frozen=True)
class Usage:
    """The cost of a request. Seconds are the runtime's own work, without the time its reader took between pieces.

    prompt_tokens include image_tokens; new_tokens include the end-of-sequence token. vision_seconds: cutting the
    images into patches and encoding them. prefill_seconds: the prompt up to and with the choice of the first token.
    decode_seconds: all later tokens, so decode_seconds / (new_tokens - 1) is the time between two tokens.
    """

    prompt_tokens: int
    image_tokens: int
    new_tokens: int = 0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Piece:
    """The output of one step. text may be "" while a character or a possible stop string is unfinished.

    token_ids include the end-of-sequence token; sampled has one entry for each of them.
    finish_reason and usage are None on all pieces but the last.
    """

    text: str
    token_ids: tuple[int, ...]
    sampled: tuple[Sampled, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer; the fields are those of its pieces together."""

    text: str
    token_ids: tuple[int, ...]
    sampled: tuple[Sampled, ...]
    finish_reason: FinishReason
    usage: Usage

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Completion:
        """pieces: all of an answer, the last one included."""
        last = pieces[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        return cls(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.token_ids),
            tuple(sampled for piece in pieces for sampled in piece.sampled),
            last.finish_reason,
            last.usage,
        )


class Meter:
    """Counts what a request costs while it runs. Any thread may read it."""

    def __init__(self, prompt_tokens: int, image_tokens: int) -> None:
        self._prompt_tokens, self._image_tokens = prompt_tokens, image_tokens
        self._new_tokens = 0
        self._seconds: dict[Phase, float] = {"vision_seconds": 0.0, "prefill_seconds": 0.0, "decode_seconds": 0.0}

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._image_tokens, self._new_tokens, *self._seconds.values())

    def count_token(self) -> None:
        self._new_tokens += 1

    def add(self, phase: Phase, seconds: float) -> None:
        """Count seconds that the runtime worked on the request."""
        self._seconds[phase] += seconds

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Add the seconds of the block to `phase`, whether it succeeds or not."""
        started = perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += perf_counter() - started


class Answer(Iterator[Piece]):
    """Yields pieces as they are made. Nothing is computed before the first is asked for.

    Whoever leaves before the last piece closes it, which frees the request's cache: by `close`, by a with statement,
    or by dropping the last reference. Iteration ends without another piece once the answer was closed or cancelled.
    """

    def __init__(self, stream: Generator[Piece, None, None], meter: Meter, cancellation: Cancellation) -> None:
        self._stream = stream
        self._meter = meter
        self._cancellation = cancellation
        self._lock = threading.RLock()  # held by the thread that runs the stream
        self._running = False

    @property
    def usage(self) -> Usage:
        """The cost of the request so far; complete once it has ended, in whatever way."""
        return self._meter.usage

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> Piece:
        with self._lock:
            self._running = True
            try:
                piece = next(self._stream)
            except Cancelled:
                raise StopIteration from None
            finally:
                self._running = False
        if self._cancellation.cancelled:
            self._end()  # whoever cancelled meanwhile could not
            raise StopIteration
        return piece

    def cancel(self) -> None:
        """End the answer from any thread or signal handler, and return at once.

        A thread that waits for the next piece is stopped: before its next step on a GPU, on a CPU also within a step,
        after the operator that runs at the time.
        """
        self._cancellation.cancel()
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()

    def close(self) -> None:
        """End the answer from any thread, and return when nothing of it runs any more and its cache is free."""
        self._cancellation.cancel()
        with self._lock:
            self._end()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        if not self._running:  # a signal handler interrupts its own thread: the stream ends by itself
            self._stream.close()
