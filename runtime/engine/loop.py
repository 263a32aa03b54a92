"""The one loop that runs an engine for all requests of a runtime."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from time import monotonic, perf_counter

from moevlm.runtime.core.errors import Cancelled, EngineError, QueueFull
from moevlm.runtime.engine.answer import Piece
from moevlm.runtime.engine.cancellation import Cancellation, Together
from moevlm.runtime.engine.image_features import FeatureCache, ImageEncoder
from moevlm.runtime.engine.packing import StepPacker
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.scheduler import Part, Scheduler
from moevlm.runtime.engine.sequence import Listener, Sequence
from moevlm.runtime.engine.visual import VisualFeatures


class EngineLoop:
    """Steps an engine for the sequences that are given to it. It has no thread: whoever waits for a piece steps.

    One thread steps at a time, for all sequences, and the others wait for what it makes of theirs. So a single reader
    hands nothing over, and several share every step.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        packer: StepPacker,
        encoder: ImageEncoder | None,
        features: FeatureCache,
    ) -> None:
        self._engine, self._scheduler, self._packer = engine, scheduler, packer
        self._encoder, self._features = encoder, features
        self._changed = threading.Condition()  # of all that follows, and of every sequence's pieces and status
        self._stepping: int | None = None  # the thread that does, or that changes the scheduler between two steps
        self._visitors = 0  # threads that want the scheduler between two steps: they go before the next step
        self._arrived: deque[Sequence] = deque()

    @property
    def used_pages(self) -> int:
        """Pages that requests have now; others may stay warm."""
        return self._scheduler.used_pages

    def forget(self) -> None:
        """Drop what is kept for requests to come: warm pages, and features of images."""
        with self._between_steps():
            self._scheduler.forget()
            self._features.forget()

    def check(self, sequence: Sequence) -> None:
        """Raises RequestError for a sequence that the whole cache, or a step, cannot hold."""
        self._scheduler.check(sequence)

    def add(self, sequence: Sequence, waiting: int | None = None) -> None:
        """Have a sequence computed from the next step on.

        Raises QueueFull where `waiting` others wait already, and RequestError as `check`.
        """
        with self._changed:
            self._scheduler.check(sequence)
            count = self._scheduler.queued + len(self._arrived)
            if waiting is not None and count >= waiting:
                raise QueueFull(f"{count} requests wait already (allowed: {waiting})")
            self._arrived.append(sequence)
            self._changed.notify_all()

    def next_piece(self, sequence: Sequence) -> Piece | None:
        """The sequence's next piece, which this thread makes if no other does; None at its end.

        Raises the error that ended it. What interrupts this thread while it steps ends no sequence.
        """
        while True:
            with self._turn() as news:
                with self._changed:
                    while self._busy and not sequence.pieces and sequence.status != "ended":
                        self._changed.wait()
                    if sequence.pieces:
                        return self.take(sequence)
                    if sequence.status == "ended":
                        if sequence.error is not None:
                            raise sequence.error
                        return None
                    self._stepping = threading.get_ident()
                self._step(news)

    def step(self) -> None:
        """Step once for all, for a caller that waits for no piece."""
        with self._turn() as news:
            with self._changed:
                self._take_turn()
            self._step(news)

    def take(self, sequence: Sequence) -> Piece:
        """The oldest of the pieces that wait; there is one."""
        with self._changed:
            if sequence.paused:
                self._changed.notify_all()  # it goes on
            return sequence.pieces.popleft()

    def serve(self, stop: threading.Event) -> None:
        """Step for all whenever there is something to do, until `stop` is set and `wake` called.

        What was cancelled before has ended then.
        """
        while True:
            with self._turn() as news:
                with self._changed:
                    while not stop.is_set() and (self._busy or not self._wanted()):
                        self._changed.wait(None if self._busy else self._seconds_left())
                    if stop.is_set():
                        break
                    self._stepping = threading.get_ident()
                self._step(news)
        with self._turn() as news, self._between_steps():
            self._take_in()
            news += self._scheduler.sweep(monotonic())

    def wake(self) -> None:
        """Have the thread that serves look again, as after a cancellation."""
        with self._changed:
            self._changed.notify_all()

    def leave(self, sequence: Sequence) -> None:
        """End a sequence, wherever it is, and return when no step computes it any more and its pages are free.

        From within a step or another call of this, as a signal handler or a destructor may come, it ends with that.
        """
        sequence.cancellation.cancel()
        if self._stepping == threading.get_ident():
            return
        with self._turn() as news, self._changed:
            while self._stepping is not None and sequence.status != "ended":
                self._changed.wait()
            if sequence.status != "ended":
                self._stepping = threading.get_ident()
                if sequence in self._arrived:
                    self._arrived.remove(sequence)
                self._scheduler.remove(sequence)
                news += self._scheduler.sweep(monotonic())
            sequence.pieces.clear()
            self._changed.notify_all()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """No step runs within the block, nor another before it."""
        with self._changed:
            self._take_turn()
            try:
                yield
            finally:
                self._stepping = None
                self._changed.notify_all()

    def _take_turn(self) -> None:
        """Be the next that steps."""
        self._visitors += 1
        try:
            while self._stepping is not None:
                self._changed.wait()
            self._stepping = threading.get_ident()
        finally:
            self._visitors -= 1
            self._changed.notify_all()

    @property
    def _busy(self) -> bool:
        """Whether a thread that wants to step has to wait."""
        return self._stepping is not None or self._visitors > 0

    def _wanted(self) -> bool:
        """Whether a step, or the end of a sequence, is due."""
        now = monotonic()
        return bool(self._arrived) or any(
            not one.paused or one.cancellation.cancelled or (one.deadline is not None and one.deadline <= now)
            for one in self._scheduler.sequences
        )

    def _seconds_left(self) -> float | None:
        """Until the first deadline of all."""
        first = min((one.deadline for one in self._scheduler.sequences if one.deadline is not None), default=None)
        return None if first is None else max(first - monotonic(), 0.0)

    @contextmanager
    def _turn(self) -> Iterator[list[Sequence]]:
        """Whoever steps within the block, and fills the list, does no longer after it, and others are told.

        Even if an interrupt comes just before the step.
        """
        news: list[Sequence] = []
        try:
            yield news
        finally:
            with self._changed:
                if self._stepping == threading.get_ident():
                    self._stepping = None
                    self._changed.notify_all()
            listeners: dict[Listener, list[Sequence]] = {}
            for sequence in news:
                if sequence.listener is not None:
                    listeners.setdefault(sequence.listener, []).append(sequence)
            for listener, sequences in listeners.items():
                listener(sequences)

    def _step(self, news: list[Sequence]) -> None:
        """One step of the engine. news: takes the sequences that have a piece more, or have ended."""
        with self._changed:
            self._take_in()
        everyone = self._scheduler.sequences
        try:
            self._run(news)
        except Exception as error:  # a bug outside of the engine, which no thread that waits would be told of
            self._scheduler.restart(everyone, error)
            news[:] = everyone
        except BaseException:  # of the thread that happens to step, and of no sequence
            self._scheduler.restart(everyone)
            news[:] = everyone
            raise

    def _take_in(self) -> None:
        while self._arrived:
            self._scheduler.add(self._arrived.popleft())

    def _run(self, news: list[Sequence]) -> None:
        """See `_step`. What it raises leaves the scheduler as it may be."""
        started = perf_counter()
        news += self._scheduler.sweep(monotonic())
        parts: Items[Part] = self._scheduler.schedule()
        try:
            encoding = perf_counter()
            parts = self._encoded(parts, news)
            started += perf_counter() - encoding
            if not parts:
                return
            step, visual = self._packer.pack(parts)
            output = self._engine.forward(step, visual, _cancellation(parts))
        except Cancelled:
            self._scheduler.abort(parts)
            news += self._scheduler.sweep(monotonic())
        except Exception as error:
            self._fail(parts, error, news)
        else:
            news += self._scheduler.finish(parts, output, started)

    def _encoded(self, parts: Items[Part], news: list[Sequence]) -> list[Part]:
        """Have the images of each part encoded. Returns the parts of which that succeeded."""
        ready = []
        for part in parts:
            sequence = part.sequence
            try:
                if sequence.images and (missing := sequence.unencoded(part.start, part.stop)):
                    with sequence.meter.timed("vision_seconds"):
                        self._encode(sequence, missing[0])
            except Cancelled:  # others that were cancelled meanwhile take part in this step and end after it
                self._scheduler.abort([part])
                self._scheduler.remove(sequence)
                news.append(sequence)
            except Exception as error:
                self._fail([part], error, news)
            else:
                ready.append(part)
        return ready

    def _encode(self, sequence: Sequence, first: int) -> None:
        """Encode the images of a sequence from place `first` on, each that is not known once."""
        wanted = {image.digest: image for image in sequence.images[first:] if self._features.get(image.digest) is None}
        found: dict[bytes, VisualFeatures] = {}
        if wanted:
            if self._encoder is None:
                raise EngineError("this runtime was made without image input")
            images = [image.image() for image in wanted.values()]
            found = dict(zip(wanted, self._encoder.encode(images, sequence.cancellation), strict=True))
        for place, image in enumerate(sequence.images[first:], first):
            known = found.get(image.digest) or self._features.get(image.digest)
            assert known is not None
            sequence.features[place] = known
        for digest, features in found.items():
            self._features.put(digest, features)

    def _fail(self, parts: Items[Part], error: Exception, news: list[Sequence]) -> None:
        self._scheduler.fail(parts, error)
        news += [part.sequence for part in parts]


def _cancellation(parts: Items[Part]) -> Cancellation:
    """Ends the step if nobody wants any of it."""
    each = [part.sequence.cancellation for part in parts]
    return each[0] if len(each) == 1 else Together(each)
