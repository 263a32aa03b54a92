"""tiktoken.model: on each line a token in base64 and its rank. Neither special tokens nor how texts are split.

A text is split as the family says, for the checkpoint says it in code alone, which is not run. Special tokens are those
of tokenizer_config.json; ids between them are `<|reserved_token_ID|>`, as in that code and in transformers 5.24.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from moevlm.export.checkpoint.files import read_text
from moevlm.export.checkpoint.ranked_tokens import MAX_SPECIAL, ranked, tokenizer_json
from moevlm.runtime.core.errors import CheckpointError, shown

TIKTOKEN = "tiktoken.model"


def of_tiktoken(directory: Path, pattern: str, named: Mapping[int, str]) -> str:
    """tokenizer.json of the directory's tiktoken.model. named: special tokens by id. Raises CheckpointError."""
    tokens = ranked(_lines(read_text(directory, TIKTOKEN)), TIKTOKEN)
    ordinary, first, end = set(tokens), len(tokens), len(tokens) + MAX_SPECIAL
    for token_id, content in named.items():
        if not first <= token_id < end or content.encode() in ordinary:
            raise CheckpointError(
                f"tokenizer_config.json: the token {shown(content)} with the id {token_id} does not go with the "
                f"{first} of {TIKTOKEN} (allowed: other tokens than these, from {first} to {end - 1})"
            )
    if min(named, default=None) != first:  # of a file that lost its last lines, and where nothing names the tokens
        raise CheckpointError(
            f"{TIKTOKEN} has {first} tokens, and tokenizer_config.json names no special token with the next id, "
            f"{first}: lines are missing, or special tokens"
        )
    ids = range(first, max(named) + 1)
    control = {token_id: named.get(token_id, f"<|reserved_token_{token_id}|>") for token_id in ids}
    if len(set(control.values())) < len(control):
        twice = next(text for text in control.values() if list(control.values()).count(text) > 1)
        raise CheckpointError(f"tokenizer_config.json has the token {shown(twice)} under two ids")
    return tokenizer_json(tokens, 0, pattern, control)


def _lines(text: str) -> Iterator[tuple[str, str, int]]:
    for number, line in enumerate(text.splitlines(), 1):
        token, _, rank = line.partition(" ")
        if line and not (rank.isascii() and rank.isdigit() and len(rank) < 10):
            raise CheckpointError(f"{TIKTOKEN}, line {number}: {shown(line)} is not a token in base64 and its rank")
        if line:
            yield f"line {number}", token, int(rank)
