"""A vocabulary of byte strings by rank, as tiktoken.model and tekken.json hold one, and its tokenizer.json.

tiktoken's rule: a piece of text that is a token is taken whole. Of any other piece, the two neighbours whose bytes
together are the token of the lowest rank become one, the leftmost such pair of several, until no two neighbours are a
token. tokenizer.json lists pairs of tokens in the order in which they are merged: here every pair of tokens that
together are one, by the rank of that one. Two pairs of the same token never overlap where the rule would meet both.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moevlm.runtime.core.errors import CheckpointError, shown

MAX_TOKEN_BYTES = 1024  # the longest that are published have some hundred
MAX_SPECIAL = 4096  # Kimi has 256, Mistral 1,000

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
# GPT-2's alphabet: a character for each byte, of which none is blank.
_ALPHABET = {byte: 0x100 + i for i, byte in enumerate(_OTHERS)}


def ranked(entries: Iterable[tuple[str, Any, Any]], file: str) -> list[bytes]:
    """Tokens in the order of their ranks. entries: where in the file, a token in base64, its rank.

    Raises CheckpointError for a token that is not base64, is empty, too long or there twice, for ranks that are not
    0, 1, 2 and so on, and for a byte that is not a token.
    """
    by_rank: dict[int, bytes] = {}
    ranks: dict[bytes, int] = {}
    for where, text, rank in entries:
        try:
            token = base64.b64decode(text, validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise CheckpointError(f"{file}, {where}: the token {shown(text)} is not base64") from None
        if not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise CheckpointError(f"{file}, {where}: a token of {len(token)} bytes (allowed: 1 to {MAX_TOKEN_BYTES})")
        if type(rank) is not int or rank < 0:
            raise CheckpointError(f"{file}, {where}: the rank {shown(rank)} is not a number from 0 on")
        if rank in by_rank:
            raise CheckpointError(f"{file}, {where}: a second token of rank {rank}")
        if token in ranks:
            raise CheckpointError(f"{file}, {where}: the token {shown(token)} is there twice, first as {ranks[token]}")
        by_rank[rank] = token
        ranks[token] = rank
    for rank in range(len(by_rank)):
        if rank not in by_rank:
            raise CheckpointError(f"{file} has {len(by_rank)} tokens, and none of rank {rank}")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise CheckpointError(f"{file} has no token for the byte {byte}: some texts would have no tokens")
    return [by_rank[rank] for rank in range(len(by_rank))]


def tokenizer_json(tokens: Sequence[bytes], first: int, pattern: str, control: Mapping[int, str]) -> str:
    """tokenizer.json of a ranked vocabulary.

    tokens: by rank; the id of a token is `first` and its rank. pattern: what a piece of a text is, as a regular
    expression. control: special tokens by their ids, which lie below the others, or follow on them without a gap.
    """
    spelled = [token.decode("latin-1").translate(_ALPHABET) for token in tokens]
    vocabulary = {content: token_id for token_id, content in sorted(control.items()) if token_id < first}
    vocabulary |= {content: first + rank for rank, content in enumerate(spelled)}
    model = {
        "type": "BPE",
        "ignore_merges": True,
        "vocab": vocabulary,
        "merges": [[spelled[left], spelled[right]] for left, right in _merges(tokens)],
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in sorted(control.items())],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
        "post_processor": None,
        "decoder": as_bytes,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False)


def _merges(tokens: Sequence[bytes]) -> Iterable[tuple[int, int]]:
    """Ranks of the left and the right part of each way to cut a token in two other ones."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tokens:
        cuts = ((ranks.get(token[:i]), ranks.get(token[i:])) for i in range(1, len(token)))
        yield from sorted((left, right) for left, right in cuts if left is not None and right is not None)
