"""SIGINT and SIGTERM while a command computes: heard at once, in the middle of a step, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moevlm.runtime.backends.ort.engine import OrtEngine
from moevlm.runtime.cli.background import Background
from moevlm.runtime.core.errors import Cancelled, RequestError
from tests.support.command_line import call

SIGNALS = pytest.mark.parametrize(
    ("kind", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)


@SIGNALS
def test_a_running_step_of_run_is_cancelled(
    kind: signal.Signals, status: int, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[type[BaseException]] = []
    forward = OrtEngine.forward

    def signalled(engine: OrtEngine, step: Any, visual: Any, cancellation: Any) -> Any:
        reached = threading.Event()
        try:
            with cancellation.stopping(reached.set):
                os.kill(os.getpid(), kind)
                assert reached.wait(60)  # the main thread hears it while this step runs
            return forward(engine, step, visual, cancellation)
        except BaseException as error:
            ended.append(type(error))
            raise

    monkeypatch.setattr(OrtEngine, "forward", signalled)
    result = call("run", tiny_bundle, "--prompt", "Hi", "--target", "ort-cpu")
    assert (result.status, result.out) == (status, "")
    assert ended == [Cancelled]
    assert "Traceback" not in result.err


@SIGNALS
def test_a_call_that_nothing_stops_does_not_hold_the_process(kind: signal.Signals, status: int) -> None:
    program = """
import sys, threading
from moevlm.runtime.cli import main as cli
from moevlm.runtime.cli import command_line
from moevlm.runtime.cli.background import Background

def work():
    print("working", flush=True)
    threading.Event().wait()

def command(arguments):
    with Background() as background:
        background.call(work)

command_line.run = command
sys.exit(cli.main([]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(kind)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err


def test_a_background_passes_on_results_errors_and_order() -> None:
    seen: list[int] = []
    with Background() as background:
        assert [background.call(partial(lambda n: seen.append(n) or n * n, n)) for n in range(3)] == [0, 1, 4]
        for error in (RequestError("no"), SystemExit(3)):
            with pytest.raises(type(error)) as caught:
                background.call(partial(_raise, error))
            assert caught.value is error
        assert background.call(threading.get_ident) != threading.get_ident()
        assert not background.busy
    background.join(60)
    assert seen == [0, 1, 2]


def test_an_interrupted_call_is_stopped_and_not_waited_for_without_end() -> None:
    stopped, release = threading.Event(), threading.Event()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert release.wait(60)

    with Background() as background:
        with pytest.raises(KeyboardInterrupt):
            background.call(work, stopped.set)
        assert stopped.is_set()
        assert background.busy
        release.set()
        assert background.call(lambda: 5) == 5  # not what the other call returned
        assert not background.busy
    background.join(60)


def _raise(error: BaseException) -> Callable[[], None]:
    raise error
