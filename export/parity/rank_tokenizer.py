"""tiktoken.model by its definition: what a bundle's tokenizer is held to where transformers cannot read that file.

transformers 5.24 needs the package tiktoken for it, and splits texts by Llama's rule whoever the model is. Kimi's own
code is not run, either. This reader shares nothing with the build's but the expression that splits a text, which
another library understands for it.
"""

import base64
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
from transformers.utils.chat_template_utils import render_jinja_template

Messages = list[dict[str, Any]]


class RankTokenizer:
    """What parity asks of a tokenizer of transformers: texts to ids and back, and the template with named tokens."""

    def __init__(self, checkpoint: Path, splitting: str) -> None:
        """splitting: see `families.base.Family`."""
        lines = (checkpoint / "tiktoken.model").read_bytes().split(b"\n")
        pairs = [line.split() for line in lines if line.strip()]
        self._ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        config = json.loads((checkpoint / "tokenizer_config.json").read_text())
        names = {int(token_id): token["content"] for token_id, token in config.get("added_tokens_decoder", {}).items()}
        self._special = {
            names.get(token_id, f"<|reserved_token_{token_id}|>"): token_id
            for token_id in range(len(self._ranks), max(names, default=-1) + 1)
        }
        self._bytes = {rank: token for token, rank in self._ranks.items()}
        self._bytes |= {token_id: name.encode() for name, token_id in self._special.items()}
        self._pieces = regex.compile(splitting, regex.V1)  # which has && in sets of characters
        longest_first = sorted(self._special, key=len, reverse=True)
        self._specials = regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")  # which nothing matches
        self._named = {
            name: token if isinstance(token, str) else token["content"]
            for name, token in config.items()
            if name.endswith("_token") and token
        }
        self.bos_token = self._named.get("bos_token")
        template = config.get("chat_template")
        self.chat_template = {t["name"]: t["template"] for t in template} if isinstance(template, list) else template

    def apply_chat_template(self, messages: Messages, *, chat_template: str, **options: Any) -> str:
        """The text of a conversation, as transformers renders it."""
        del options["tokenize"]
        render: Any = render_jinja_template
        rendered, _ = render([messages], chat_template=chat_template, **options, **self._named)
        return str(rendered[0])

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:  # noqa: ARG002
        """Ids; special tokens in the text are theirs."""
        return {"input_ids": list(self._ids(text))}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""
        special = set(self._special.values()) if skip_special_tokens else set()
        return b"".join(self._bytes[i] for i in ids if i not in special).decode(errors="replace")

    def _ids(self, text: str) -> Iterator[int]:
        start = 0
        for found in self._specials.finditer(text):
            yield from self._ordinary(text[start : found.start()])
            yield self._special[found.group()]
            start = found.end()
        yield from self._ordinary(text[start:])

    def _ordinary(self, text: str) -> Iterator[int]:
        for piece in self._pieces.findall(text):
            yield from self._merged(piece.encode())

    def _merged(self, piece: bytes) -> list[int]:
        if piece in self._ranks:
            return [self._ranks[piece]]
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while True:
            joined = [self._ranks.get(a + b) for a, b in pairwise(parts)]
            known = [rank for rank in joined if rank is not None]
            if not known:
                return [self._ranks[part] for part in parts]
            at = joined.index(min(known))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
