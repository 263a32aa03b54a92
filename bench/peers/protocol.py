"""What a measured system is asked, one JSON line each way, and the loop that answers. Standard library and numpy only.

    python -m bench.peers.NAME --checkpoint DIR --bits 4 [--threads 2]

prints {"ready": {versions}} when its model is loaded, then one reply for each request on standard input.
"""

import argparse
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

SPECIAL = 64  # ids at the end of the vocabulary that random prompts leave out: those of images are among them


@dataclass(frozen=True)
class Request:
    """One measurement.

    metric: decode: `tokens` steps of `batch` sequences that have `past` tokens each;
            clients: the same, of `batch` clients at once, each token the one that was chosen;
            prefill: a prompt of `tokens` tokens, up to the choice of the first new one;
            first_token: the same after an image of image_size x image_size pixels, from its pixels on.
    """

    metric: str
    tokens: int
    past: int = 0
    batch: int = 1
    image_size: int = 0


@dataclass(frozen=True)
class Reply:
    """seconds: wall time. tokens: how many were computed in it. chosen: the last argmax of the first sequence.

    All systems get the same tokens, so `chosen` shows that they run the same model, as far as their precision goes.
    """

    seconds: float
    tokens: int
    chosen: int


Timed = tuple[float, int]  # (seconds, the last argmax of the first sequence)


class System(ABC):
    """A loaded model. Every method times its own work, the choice of each token by argmax included."""

    versions: dict[str, str]
    vocabulary: int

    @abstractmethod
    def prefill(self, ids: np.ndarray) -> Timed:
        """ids: [S] int64, the prompt."""

    @abstractmethod
    def decode(self, history: np.ndarray, steps: np.ndarray) -> Timed:
        """history: [B, past] int64, not timed. steps: [B, T] int64, fed one column at a time whatever was chosen."""

    def clients(self, history: np.ndarray, tokens: int) -> Timed:
        """history: [B, past] int64, not timed. Each of B clients then gets `tokens` tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no clients")

    def first_token(self, pixels: np.ndarray, ids: np.ndarray) -> Timed:
        """pixels: [height, width, 3] uint8, an image before the text ids [S] int64."""
        raise NotImplementedError(f"{type(self).__name__} takes no images")


def arguments(description: str) -> argparse.Namespace:
    """checkpoint, bits and threads, as every system takes them; target and group_size: an engine of our own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--target", default="")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def serve(load: Callable[[], System]) -> None:
    """Load, then answer until standard input ends. Whatever libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    system = load()
    _say(replies, {"ready": system.versions})
    for line in sys.stdin:
        _say(replies, asdict(answer(system, Request(**json.loads(line)))))


def answer(system: System, request: Request) -> Reply:
    """Measure once, on tokens that depend on the request alone."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, system.vocabulary - SPECIAL, (request.batch, request.past + request.tokens))
    match request.metric:
        case "prefill":
            seconds, chosen = system.prefill(ids[0])
        case "decode":
            seconds, chosen = system.decode(ids[:, : request.past], ids[:, request.past :])
        case "clients":
            seconds, chosen = system.clients(ids[:, : request.past], request.tokens)
        case "first_token":
            pixels = rng.integers(0, 256, (request.image_size, request.image_size, 3), np.uint8)
            seconds, chosen = system.first_token(pixels, ids[0])
        case other:
            raise ValueError(f'unsupported metric = "{other}" (supported: clients, decode, first_token, prefill)')
    return Reply(seconds, request.batch * request.tokens, chosen)


def _say(replies: TextIO, value: object) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()
