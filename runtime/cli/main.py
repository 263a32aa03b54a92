"""The `moevlm` command as a process: signals, streams, errors in one line, and the exit status.

Whatever takes a while to import is imported only where a signal is heard.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from moevlm.runtime.cli.background import leave
from moevlm.runtime.cli.stop_signals import StopSignals
from moevlm.runtime.core.errors import MoevlmError
from moevlm.runtime.core.printable import escape_unencodable, message_line

_WRITERS = ("build", "parity")  # what of theirs is half done is removed


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run the command line; the exit status.

    0; 1 if parity found a mismatch, or nobody reads the output any more; 2 for a mistake of the user's, which is one
    line on standard error; 128 and a signal's number if one ended it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _occupy_closed_streams()
    with StopSignals() as stop:
        try:
            for stream in (sys.stdout, sys.stderr):
                escape_unencodable(stream)
            from moevlm.runtime.cli.command_line import run

            status = run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk is told here, or Python tells it in its own way
        except BaseException as error:
            if stop.status is not None:
                if stop.status == 128 + signal.SIGINT:
                    written = ": nothing was left half-written" if {*arguments[:2]} & {*_WRITERS} else ""
                    _say(f"interrupted{written}")
                leave(stop.status)
            return _status(error, "--debug" in arguments)
    return status


def _occupy_closed_streams() -> None:
    """Let no file that is opened later become number 0, 1 or 2, to which libraries write what they have to say."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # becomes the lowest number that is free


def _status(error: BaseException, debug: bool) -> int:
    """Say what happened; the exit status. What nobody expected is raised again."""
    if isinstance(error, SystemExit):
        leave(error.code)
    if isinstance(error, OSError):
        _drop_output()
    if isinstance(error, BrokenPipeError):
        return 1
    message = _message(error)
    if message is None:
        raise error
    if debug:
        import traceback

        traceback.print_exc()
    _say(f"error: {message_line(message)}")
    return 2


def _message(error: BaseException) -> str | None:
    """The message for the user; None for an error that is not theirs."""
    if isinstance(error, MoevlmError):
        return str(error)
    if isinstance(error, MemoryError):
        return "this machine has not enough memory for it"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    from moevlm.runtime.cli.command_line import usage_message

    return usage_message(error)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # standard error may be closed, or full
        print(line, file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Drop what is still in the buffer and cannot be written: Python would try once more at its end."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
