"""Keeps control tokens that a message holds plain text, so that no user can close a turn or open another."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from moevlm.runtime.errors import RequestError, shown
from moevlm.runtime.template_text import marks_of
from moevlm.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

_ROUNDS = 16


class ControlGuard:
    """Encodes a rendered prompt, in which a control token stands only where the chat template wrote it.

    Users do ask what "<|im_end|>" means, so their text is kept, as ordinary tokens, not refused. The whole text is
    encoded at once, as Hugging Face does, because tokens merge across the seam between template and message. Where a
    control token comes out of characters of a message, the text is cut behind the first of them and encoded again: a
    tokenizer cannot see a token across two calls. What counts is what the tokenizer made, whatever the template did to
    the text, and however the tokenizer spells it.
    """

    def __init__(self, tokenizer: Tokenizer, control: Collection[int]) -> None:
        """control: ids of the tokens that a message may not make."""
        self._tokenizer = tokenizer
        self._control = frozenset(control)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text from ChatTemplate.render. Raises RequestError for a token that cannot be cut apart."""
        marks = marks_of(text)
        cuts = [0]
        for _ in range(_ROUNDS):
            ends = [*cuts[1:], len(text)]
            encodings = self._tokenizer.encodings([text[a:b] for a, b in zip(cuts, ends, strict=True)])
            more = [
                start + begin + 1
                for start, encoding in zip(cuts, encodings, strict=True)
                for begin in self._forged(encoding, text, marks, start)
            ]
            if not more:
                return [token for encoding in encodings for token in encoding.ids]
            cuts = sorted({*cuts, *more})
        raise RequestError("the messages hold control tokens that cannot be kept text")

    def _forged(self, encoding: Encoding, text: str, marks: bytes, start: int) -> Iterator[int]:
        """Where control tokens begin that are not all the template's, from the piece's start."""
        for i, token in enumerate(encoding.ids):
            if token not in self._control:
                continue
            begin, end = encoding.token_to_chars(i) or (0, 0)
            word = text[start + begin : start + end]
            begin, end = begin + len(word) - len(word.lstrip()), begin + len(word.rstrip())  # blanks may be a message's
            if 0 not in marks[start + begin : start + end]:
                continue
            if end - begin < 2:
                raise RequestError(f"{shown(word)} in a message is a control token, and cannot be text")
            yield begin
