"""Treats control tokens in a message as plain text, so that no user can close a turn or open another."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from moevlm.runtime.core.errors import RequestError, shown
from moevlm.runtime.request.template_text import marks_of
from moevlm.runtime.request.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

    from moevlm.runtime.request.chat import ChatTemplate

_ROUNDS = 16


def control_tokens(tokenizer: Tokenizer, template: ChatTemplate, own: Collection[int]) -> frozenset[int]:
    """Ids of the added tokens that steer the model: flagged special, the model's own, or written by the template.

    own: see `ModelMetadata.control_token_ids`. The flag alone says what a decoder leaves out. Some tokenizers add
    tokens of blanks, which stand in any text.
    """
    return frozenset(
        token_id
        for token, token_id in tokenizer.added.items()
        if token_id in tokenizer.special_ids or token_id in own or (token.strip() and template.writes(token))
    )


class ControlGuard:
    """Encodes a rendered prompt, in which a control token stands only where the chat template wrote it.

    Users do ask what "<|im_end|>" means, so their text is kept, as ordinary tokens, not refused. The whole text is
    encoded at once, as Hugging Face does, because tokens merge across the seam between template and message. Where a
    control token comes out of characters of a message, the text is cut behind the first of them and encoded again: a
    tokenizer cannot see a token across two calls. What counts is what the tokenizer made, whatever the template did to
    the text, and however the tokenizer spells it.
    """

    def __init__(self, tokenizer: Tokenizer, control: Collection[int]) -> None:
        """control: ids of the tokens that no message may make; of other added tokens those that the template wrote."""
        self._tokenizer = tokenizer
        self._control = frozenset(control)
        self._added = frozenset(token_id for token, token_id in tokenizer.added.items() if token.strip())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text from ChatTemplate.render. Raises RequestError for a token that cannot be cut apart."""
        marks = marks_of(text)
        cuts = [0]
        control = self._control
        for _ in range(_ROUNDS):
            ends = [*cuts[1:], len(text)]
            encodings = self._tokenizer.encodings([text[a:b] for a, b in zip(cuts, ends, strict=True)])
            found = [
                (token, begin, end)
                for start, encoding in zip(cuts, encodings, strict=True)
                for token, begin, end in self._found(encoding, text, start)
            ]
            control |= {token for token, begin, end in found if 0 not in marks[begin:end]}
            forged = [(begin, end) for token, begin, end in found if token in control and 0 in marks[begin:end]]
            if not forged:
                return [token for encoding in encodings for token in encoding.ids]
            for begin, end in forged:
                if end - begin < 2:
                    raise RequestError(f"{shown(text[begin:end])} in a message is a control token, and cannot be text")
            cuts = sorted({*cuts, *(begin + 1 for begin, _ in forged)})
        raise RequestError("the messages hold control tokens that cannot be kept text")

    def _found(self, encoding: Encoding, text: str, start: int) -> Iterator[tuple[int, int, int]]:
        """(id, begin, end) of each added token of a piece that begins at `start`."""
        for i, token in enumerate(encoding.ids):
            if token in self._added:
                begin, end = encoding.token_to_chars(i) or (0, 0)
                word = text[start + begin : start + end]
                # A token may swallow the blanks around it, which may be a message's.
                yield token, start + begin + len(word) - len(word.lstrip()), start + begin + len(word.rstrip())
