"""Keeps special tokens that a user typed plain text, so that no user can close a turn or open another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moevlm.runtime.errors import RequestError

# U+FDD0..U+FDEF are noncharacters: never assigned, set aside for a program's own use.
_STAND_INS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class ControlGuard:
    """Tells special tokens written by the chat template from those in the messages' text.

    Users do ask what "<|im_end|>" means, so their text is kept, as ordinary tokens, not refused. Encoding each text on
    its own would not do: tokens merge across the seam between template and text, and the result would differ from
    Hugging Face's. So before rendering, the first character of each special token in a text is replaced by a stand-in;
    the template moves it along like any other; afterwards the character is put back, and the rendered text is cut
    behind it, because a tokenizer cannot see a token across two calls. A text's end that could begin a special token
    is treated in the same way, for templates that join parts. Text without special tokens is rendered and encoded
    as if there were no guard.
    """

    def __init__(self, special: Iterable[str]) -> None:
        self._tokens = tuple(special)
        self._prefixes = {token[:size] for token in self._tokens for size in range(1, len(token))}
        self._longest = max(map(len, self._tokens), default=0)
        self._first = sorted({token[0] for token in self._tokens})

    def hide(self, messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Plain messages with stand-ins, and what each stand-in stands for. Raises RequestError if none is free."""
        texts = "".join(text for message in messages for text in _texts(message["content"]))
        free = [char for char in _STAND_INS if char not in texts]
        if len(free) < len(self._first):
            raise RequestError("messages contain too many of the noncharacters U+FDD0 to U+FDEF")
        stand_in = dict(zip(self._first, free, strict=False))
        hidden = []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                content = self._hide(content, stand_in)
            else:
                content = [
                    {**part, "text": self._hide(part["text"], stand_in)} if part["type"] == "text" else part
                    for part in content
                ]
            hidden.append({**message, "content": content})
        return hidden, {char: first for first, char in stand_in.items()}

    def split(self, rendered: str, originals: dict[str, str]) -> list[str]:
        """Pieces of a rendered text, to be encoded one by one: no special token in them is from a user."""
        text = rendered.translate({ord(char): first for char, first in originals.items()})
        cuts = [at + 1 for at in sorted(self._starts(text)) if rendered[at] in originals]
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _hide(self, text: str, stand_in: dict[str, str]) -> str:
        at = self._starts(text)
        # A template may trim a text before it joins it to the next.
        end = len(text.rstrip())
        at.update(i for i in range(max(0, end - self._longest), end) if text[i:end] in self._prefixes)
        if not at:
            return text
        chars = list(text)
        for i in at:
            chars[i] = stand_in[chars[i]]
        return "".join(chars)

    def _starts(self, text: str) -> set[int]:
        """Where special tokens begin, overlapping ones included."""
        found = set()
        for token in self._tokens:
            at = text.find(token)
            while at >= 0:
                found.add(at)
                at = text.find(token, at + 1)
        return found


def _texts(content: str | list[dict[str, str]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
