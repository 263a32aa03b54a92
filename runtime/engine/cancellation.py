"""Stops one request from any thread: between steps, and inside a step where the engine can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from moevlm.runtime.core.errors import Cancelled


class Cancellation:
    """Belongs to one request. It has no lock, so that a signal handler may cancel, too."""

    def __init__(self) -> None:
        self._cancelled = False
        self._stops: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Return at once; the work ends at its next check. Once more does nothing."""
        self._cancelled = True
        for stop in tuple(self._stops):
            stop()

    def check(self) -> None:
        """Raises Cancelled after `cancel`."""
        if self._cancelled:
            raise Cancelled("the request was cancelled")

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """Call `stop` if the request is cancelled while the block runs. Raises Cancelled if it was before."""
        self.add(stop)
        try:
            self.check()  # after the line above: whoever cancels in between finds `stop`
            yield
        finally:
            self.remove(stop)

    def add(self, stop: Callable[[], None]) -> None:
        """Have `cancel` call a function."""
        self._stops.append(stop)

    def remove(self, stop: Callable[[], None]) -> None:
        """Have it do so no longer."""
        self._stops.remove(stop)


class Together(Cancellation):
    """The cancellation of work that several requests share: it ends when the last of them is cancelled."""

    def __init__(self, members: Iterable[Cancellation]) -> None:
        super().__init__()
        self._members = tuple(members)

    @property
    def cancelled(self) -> bool:
        return all(member.cancelled for member in self._members)

    def cancel(self) -> None:
        for member in self._members:
            member.cancel()

    def check(self) -> None:
        if self.cancelled:
            raise Cancelled("all requests of the step were cancelled")

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        def ask() -> None:
            if self.cancelled:
                stop()

        for member in self._members:
            member.add(ask)
        try:
            self.check()
            yield
        finally:
            for member in self._members:
                member.remove(ask)
