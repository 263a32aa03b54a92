"""A measured system as its orchestrator sees it: a process that is started, asked and stopped."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.peers.protocol import Reply, Request


class PeerError(Exception):
    """A system ended before it answered."""


class Peer:
    """One system's process; a context manager. Idle between requests: at most one system is to be asked at a time."""

    def __init__(self, name: str, command: Sequence[str], root: Path, log: Path) -> None:
        """root: where `python -m bench.peers...` finds its package. log: takes the process's standard error."""
        self.name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                list(command), cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.versions: dict[str, str] = self._read()["ready"]

    def ask(self, request: Request) -> Reply:
        """Raises PeerError if the process ends instead."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(request)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its end is what _read finds
        return Reply(**self._read())

    def resident_bytes(self) -> int:
        """Physical memory of the process now."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            said = self._log.read_text().strip().splitlines()
            raise PeerError(
                f"{self.name} ended with status {status}: {said[-1] if said else 'no message'} ({self._log})"
            )
        return json.loads(line)
