"""Builds a plan in a process of its own: TensorRT keeps its memory, and ends the process on some of its errors.

The job is a line of JSON on standard input; lines of JSON on standard output say how far it is, and at last the result.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from moevlm.export.backends.tensorrt.plan_builder import Built, Job, build_plan
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.progress import Progress


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """done, total: progress. error: one line, with errno where the system gave one. built: the result."""

    done: int = 0
    total: int = 0
    error: str = ""
    errno: int = 0
    built: Built | None = None


def run(job: Job, progress: Progress) -> Built:
    """`build_plan` in a new process. Raises as it does, and BuildError if that process ends without a word."""
    # -P: modules come from where this process has them, not from the folder that it happens to run in.
    command = [sys.executable, "-P", "-m", "moevlm.export.backends.tensorrt.worker"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):  # it ended already: what it said is in its log
                process.stdin.write(msgspec.json.encode(job) + b"\n")
                process.stdin.close()
            for line in process.stdout:
                message = msgspec.json.decode(line, type=Message)
                if message.built is not None:
                    return message.built
                if message.errno:
                    raise OSError(message.errno, message.error)
                if message.error:
                    raise BuildError(message.error)
                progress(message.done, message.total)
            log.seek(0)
            words = log.read().decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(words) if line.strip()), "it said nothing")
            raise BuildError(f"{job.product} ended while it built {Path(job.plan).name} ({process.wait()}): {last}")
        finally:
            process.kill()


def main() -> None:
    # What libraries print must not get between the messages.
    with os.fdopen(os.dup(1), "wb") as messages:
        os.dup2(2, 1)
        job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
        try:
            built = build_plan(job, lambda done, total: _send(messages, Message(done=done, total=total)))
            message = Message(built=built)
        except BuildError as error:
            message = Message(error=str(error))
        except OSError as error:
            message = Message(error=error.strerror or str(error), errno=error.errno or 5)
        _send(messages, message)


def _send(messages: BinaryIO, message: Message) -> None:
    messages.write(msgspec.json.encode(message) + b"\n")
    messages.flush()


if __name__ == "__main__":
    main()
