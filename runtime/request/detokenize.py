"""Token ids to text while they arrive: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# A character of UTF-8 has at most 4 bytes and a token at least 1, so 8 tokens always hold the unfinished character
# and a whole one before it.
_KEPT = 8
_WINDOW = 16


class Decodes(Protocol):
    """What a StreamDecoder needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token(self, token_id: int) -> str | None: ...


class StreamDecoder:
    """Text of one growing sequence. All pieces together are the text of all ids, up to the first complete stop.

    Each push decodes at most a fixed number of the latest tokens, however long the output already is.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were handed to _release
        self._held = ""  # text that may be the beginning of a stop
        self.stopped: str | None = None  # the stop string that ended the text

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; "" once stopped."""
        if self.stopped is not None:
            return ""
        if token_id in self._skipped:
            return self._skip(token_id)
        if self._tokenizer.token(token_id) is None:  # padded rows of the vocabulary have no text
            return ""
        self._window.append(token_id)
        text = self._decode()
        # Bytes of an unfinished character decode to exactly one U+FFFD at the end (Unicode, section 3.9);
        # what precedes it cannot change any more.
        sure = max(len(text) - text.endswith(_REPLACEMENT), self._given)
        fresh = text[self._given : sure]
        self._given = sure
        if len(self._window) >= _WINDOW:
            self._slide(len(text) - sure)
        return self._release(fresh)

    def flush(self) -> str:
        """The rest of the text at the end of the sequence; "" once stopped."""
        if self.stopped is not None:
            return ""
        rest = self._decode()[self._given :] if self._window else ""
        self._given += len(rest)
        released = self._release(rest)
        if self.stopped is None:
            released += self._held
        self._held = ""
        return released

    def _slide(self, waiting: int) -> None:
        """Forget early tokens. A character cut in two changes only the beginning, so count from the end."""
        self._window = self._window[-_KEPT:]
        self._given = len(self._decode()) - waiting

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=bool(self._skipped))

    def _skip(self, token_id: int) -> str:
        """A special token has no text, but it may be a stop."""
        name = self._tokenizer.token(token_id)
        if name not in self._stop:
            return ""
        rest = self.flush()
        if self.stopped is None:
            self.stopped = name
        return rest

    def _release(self, fresh: str) -> str:
        if not self._stop:
            return fresh
        text = self._held + fresh
        # The stop that is complete first wins, the longer one on a tie: so the result cannot depend on how the text
        # was split into tokens.
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, shorter than the whole of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
