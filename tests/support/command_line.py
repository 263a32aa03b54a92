"""Runs the `moevlm` command, in this process or in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

COMMAND = Path(sys.executable).with_name("moevlm")


@dataclass(frozen=True)
class Result:
    """status: the exit status. out, err: what was printed."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of standard error that are not progress, which is all there is before the first of them."""
        lines = self.err.splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith(("error:", "Traceback", "Usage"))]
        return lines[starts[0] :] if starts else []


def call(*arguments: str | Path, stdin: bytes = b"") -> Result:
    """In this process."""
    from moevlm.runtime.cli.main import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    keyboard = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "stdin", keyboard):
        try:
            status = main([str(argument) for argument in arguments]) or 0
        except SystemExit as stop:
            status = stop.code
    assert isinstance(status, int)
    return Result(status, *(stream.buffer.getvalue().decode() for stream in (out, err)))  # type: ignore[attr-defined]


def spawn(*arguments: str | Path, **options: Any) -> Result:
    """In a process of its own, as a shell runs it. options: of subprocess.run."""
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, env=environment(), **options)
    return Result(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """Without what makes rich take a pipe for a terminal, or change a terminal's width."""
    return {
        name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE")
    }


def assert_refused(result: Result, *words: str) -> None:
    """Status 2, no output, and, progress aside, one line that has all of `words`."""
    assert result.status == 2, result
    assert result.out == ""
    assert len(result.errors) == 1, result.err
    line = result.errors[0]
    assert line.startswith("error: ")
    assert result.err.splitlines()[-1] == line
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


def refused_run(bundle: Path, *arguments: str | Path, words: tuple[str, ...], stdin: bytes = b"") -> None:
    """Asking must be refused, before a word of an answer."""
    assert_refused(call("run", bundle, *arguments, stdin=stdin), *words)
