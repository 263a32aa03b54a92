"""Environments of peers under build/peers: made by commands whose output goes to a log."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.peers.client import PeerError

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "build/peers"


def run(command: Sequence[object], log: Path) -> None:
    """Run in the repository's root. Raises PeerError, naming the log, if the command fails."""
    arguments = [str(part) for part in command]
    with log.open("a") as file:
        status = subprocess.run(arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise PeerError(f"{' '.join(arguments[:4])} ... ended with status {status} (see {log})")


def new_environment(python: Path, log: Path) -> None:
    """A virtual environment whose interpreter is to be `python`."""
    run([sys.executable, "-m", "venv", "--clear", python.parents[1]], log)
