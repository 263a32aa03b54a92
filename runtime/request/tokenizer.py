"""The bundle's tokenizer.json, with limits on what it can make of a text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moevlm.runtime.core.errors import BundleError, MoevlmError, RequestError, reason

if TYPE_CHECKING:
    import tokenizers

MAX_TOKEN_CHARACTERS = 4096
MAX_GROWTH = 64  # of a text, by what the normalizer or decoder puts in the place of one character
_PIECE = 1 << 16  # characters that are counted at a time
_SEAM = 64  # tokens that a cut between two pieces may add


class Tokenizer:
    """Text to token ids and back, without truncation, padding, or tokens added around the text."""

    def __init__(self, text: str) -> None:
        """text: content of tokenizer.json. Raises BundleError if it is not a tokenizer, or one that blows texts up."""
        # One text is encoded at a time, in the thread that asks; a pool of threads would not survive a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        with library_errors(BundleError, "tokenizer.json is not a tokenizer"):
            self._core = tokenizers.Tokenizer.from_str(text)
            self._core.no_truncation()
            self._core.no_padding()
            added = self._core.get_added_tokens_decoder()
            vocabulary = self._core.get_vocab(with_added_tokens=True)
            _require_growth(self._core)
        self.added: dict[str, int] = {token.content: i for i, token in sorted(added.items())}
        self.special: dict[str, int] = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.special_ids = frozenset(self.special.values())
        self.largest_id = max(vocabulary.values(), default=-1)
        self.longest = max(map(len, vocabulary), default=0)  # characters of a token, in the vocabulary's spelling
        if self.longest > MAX_TOKEN_CHARACTERS:
            raise BundleError(
                f"tokenizer.json has a token of {self.longest} characters (allowed: up to {MAX_TOKEN_CHARACTERS})"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written out in `text` become their ids."""
        return list(self.encodings([text])[0].ids)

    def encodings(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """For each text its token ids, and which characters each came from. Other threads run meanwhile."""
        with library_errors(RequestError, "the tokenizer fails on this text"):
            # The library's call for a single text keeps Python's lock.
            return list(self._core.encode_batch(list(texts), add_special_tokens=False))

    def exceeds(self, text: str, tokens: int) -> bool:
        """Tell whether a text certainly has more than so many tokens; not many more than these are ever made."""
        if len(text) > tokens * self.longest:
            return True
        count = 0
        for start in range(0, len(text) if len(text) > max(tokens, _PIECE) else 0, _PIECE):
            with library_errors(RequestError, "the tokenizer fails on this text"):
                piece = self._core.encode_batch_fast([text[start : start + _PIECE]], add_special_tokens=False)[0]
            count += len(piece.ids) - _SEAM
            if count > tokens:
                return True
        return False

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of tokens, without special ones unless asked for; bytes that are not UTF-8 become U+FFFD."""
        with library_errors(BundleError, "tokenizer.json: decoding fails"):
            return str(self._core.decode(ids, skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token (byte-level alphabet), None outside the vocabulary."""
        text: str | None = self._core.id_to_token(token_id)
        return text


@contextmanager
def library_errors(kind: type[MoevlmError], what: str) -> Iterator[None]:
    """The library raises bare Exception, and its panics are not even that."""
    try:
        yield
    except MoevlmError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {reason(error)}") from error


def _require_growth(core: tokenizers.Tokenizer) -> None:
    """Raises BundleError for a normalizer or decoder that makes far more of a text than there was."""
    for name in ("normalizer", "decoder"):
        part = getattr(core, name)
        growth = _growth(json.loads(part.__getstate__())) if part is not None else 1
        if growth > MAX_GROWTH:
            raise BundleError(f"tokenizer.json: {name} makes a text {growth} times longer (allowed: {MAX_GROWTH})")


def _growth(part: Any) -> int:
    """The product over all steps of the characters that each may put in the place of one."""
    growth = 1
    for name, value in part.items() if isinstance(part, dict) else enumerate(part if isinstance(part, list) else ()):
        if name in ("content", "prepend", "prefix", "suffix", "replacement") and isinstance(value, str):
            growth *= max(1, len(value))
        elif isinstance(value, (dict, list)):
            growth *= _growth(value)
    return growth
