"""A thread that works for the command line, so that the main thread can hear signals meanwhile."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.1
GRACE_SECONDS = 0.5


class Background(threading.Thread):
    """Calls one function after another while its owner waits.

    Python runs signal handlers in the main thread, between two of its own instructions: a main thread that is inside a
    call of ONNX Runtime, for seconds or minutes, hears nothing.
    """

    def __init__(self) -> None:
        super().__init__(name="moevlm-background", daemon=True)
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.busy = False

    def call(self, work: Callable[[], T], stop: Callable[[], None] | None = None) -> T:
        """Return or raise what work() does. Interrupted while it waits, it calls `stop` and gives the work a moment."""
        if self.busy:  # with what was interrupted before
            self._wait()
        self.busy = True
        self._calls.put(work)
        try:
            value, error = self._wait()
        except BaseException:
            if stop is not None:
                stop()
            with suppress(queue.Empty):
                self._results.get(timeout=GRACE_SECONDS)
                self.busy = False
            raise
        self.busy = False
        if error is not None:
            raise error
        return value

    def _wait(self) -> tuple[Any, BaseException | None]:
        while True:
            # A signal that comes just before a wait does not end it.
            with suppress(queue.Empty):
                return self._results.get(timeout=POLL_SECONDS)

    def run(self) -> None:
        while (work := self._calls.get()) is not None:
            try:
                self._results.put((work(), None))
            except BaseException as error:
                self._results.put((None, error))
            del work  # no reference to a runtime while it waits

    def __enter__(self) -> Background:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.put(None)


def leave(status: int | str | None) -> NoReturn:
    """sys.exit, at once even while a library's call runs in the background: libraries crash when Python ends first."""
    if any(isinstance(thread, Background) and thread.busy for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status if isinstance(status, int) else 1)
    sys.exit(status)
