"""Signals that ask a command to end, as exceptions in the main thread, so that half-written output is removed."""

import signal
import sys
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """A context manager, in the main thread. status: 128 and the number of the first signal that came, as shells have
    it; None before.

    Libraries turn an exception that comes while they are imported into others: whatever came out, `status` tells why.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it, and shells for what runs with &
                self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.status is None:
            self.status = 128 + number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)
