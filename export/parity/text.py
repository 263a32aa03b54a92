"""Measures engines on a text of the user's own: perplexity, and divergence from the checkpoint in float32."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moevlm.export.model import CanonicalModel
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.export.parity.measures import kl_divergences, log_softmax
from moevlm.export.parity.report import TextReport, TextResult
from moevlm.export.parity.torch_engine import TorchEngine
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.tokenizer import Tokenizer

Array = np.ndarray
WINDOW = 512  # tokens that are seen together: what perplexities are commonly given for
SHORTEST = 16  # a last window with fewer is left out
_BYTES_PER_TOKEN = 64  # more than any tokenizer makes of a text that is one


@dataclass(frozen=True)
class Text:
    """file: as given. windows: pieces of its beginning, [tokens] int64 each, none seeing another."""

    file: str
    windows: list[Array]

    @classmethod
    def read(cls, path: Path, bundle: Bundle, max_tokens: int, capacity: int) -> "Text":
        """The first `max_tokens` of a UTF-8 file by the bundle's tokenizer, in windows of at most `capacity`.

        Special tokens written out in it count as such. Raises RequestError for a file that cannot be used.
        """
        if "tokenizer.json" not in bundle.manifest.files:
            raise RequestError("a text needs the bundle's tokenizer.json, and its checkpoint had none")
        ids = Tokenizer(bundle.read_text("tokenizer.json")).encode(_beginning(path, max_tokens * _BYTES_PER_TOKEN))
        ids, size, model = ids[:max_tokens], min(WINDOW, capacity), bundle.manifest.model
        if len(ids) < min(SHORTEST, size):
            raise RequestError(f"{path} has {len(ids)} tokens (allowed: {SHORTEST} or more)")
        wrong = next((i for i in ids if i >= model.vocabulary or i in model.visual_token_ids), None)
        if wrong is not None:
            raise RequestError(f"{path} has the token {wrong} (allowed: text tokens below {model.vocabulary})")
        windows = [np.array(ids[start : start + size]) for start in range(0, len(ids), size)]
        return cls(str(path), [window for window in windows if len(window) >= min(SHORTEST, size)])

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))


def measure_text(
    text: Text,
    model: CanonicalModel,
    metadata: ModelMetadata,
    engines: Mapping[str, Engine],
    progress: Callable[[str, int, int], None],
) -> TextReport:
    """Canonical PyTorch on the checkpoint's own weights, and each engine, token by token of the same windows."""
    prompts = [Prompt.from_ids(window, [], metadata) for window in text.windows]

    def ask(engine: Engine, chunk_tokens: int | None = None) -> Iterator[Array]:
        for prompt in prompts:
            batch = Batch(engine, metadata, [prompt], [], BatchLimits.of([prompt], engine.limits, steps=0))
            yield batch.prefill(chunk_tokens, every_position=True)

    reference = TorchEngine(
        model,
        lambda noted: list(ask(noted)),
        lambda *done: progress(f"running canonical PyTorch on {text.file}", *done),
    )
    asked = {name: ask(engine, defaults.CHUNK_TOKENS) for name, engine in engines.items()}
    sums = {name: _Sums() for name in asked}
    surprise = 0.0
    for number, (window, theirs) in enumerate(zip(text.windows, ask(reference), strict=True)):
        surprise += float(_surprises(theirs, window).sum())
        for name, answers in asked.items():
            sums[name].add(next(answers), theirs, window)
        progress(f"running the engines on {text.file}", number + 1, len(text.windows))
    predicted = text.tokens - len(text.windows)
    return TextReport(
        file=text.file,
        tokens=text.tokens,
        windows=len(text.windows),
        perplexity=float(np.exp(surprise / predicted)),
        engines=[total.result(name, predicted) for name, total in sums.items()],
    )


@dataclass
class _Sums:
    """Over the tokens that are predicted."""

    surprise: float = 0.0
    divergence: float = 0.0
    same: int = 0

    def add(self, ours: Array, theirs: Array, window: Array) -> None:
        self.surprise += float(_surprises(ours, window).sum())
        ours, theirs = ours[:-1], theirs[:-1]
        self.divergence += float(sum(kl_divergences(*rows).sum() for rows in _slices(ours, theirs)))
        self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())

    def result(self, name: str, tokens: int) -> TextResult:
        return TextResult(name, float(np.exp(self.surprise / tokens)), self.divergence / tokens, self.same / tokens)


def _surprises(logits: Array, window: Array) -> Array:
    """-log p of each token but the first, nats: [S - 1]. logits [S, vocabulary]."""
    parts = [
        -np.take_along_axis(log_softmax(rows), following[:, None], -1)[:, 0]
        for rows, following in _slices(logits[:-1], window[1:])
    ]
    return np.concatenate(parts)


def _slices(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """A few rows at a time: in float64 a whole window is hundreds of megabytes."""
    for start in range(0, len(arrays[0]), 64):
        yield tuple(array[start : start + 64] for array in arrays)


def _beginning(path: Path, most: int) -> str:
    """The first bytes of a file as text."""
    if not path.is_file():
        raise RequestError(f"{path} is no file")
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        # A cut may go through a character; anywhere else it is not UTF-8.
        text = data[:most].decode(errors="strict") if len(data) <= most else _cut(data[:most])
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 (at byte {error.start})") from error
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    if not text.strip():
        raise RequestError(f"{path} is empty")
    return text


def _cut(data: bytes) -> str:
    """UTF-8 that ends anywhere."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - 3 or error.reason != "unexpected end of data":
            raise
        return data[: error.start].decode()
