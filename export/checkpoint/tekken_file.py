"""tekken.json of Mistral: ranked tokens, the expression that splits a text, and special tokens, whose ids come first.

Its fields, and what holds where it lacks them: `Tekkenizer` of mistral-common, `MistralConverter` of transformers 5.24.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moevlm.export.checkpoint.files import read_json
from moevlm.export.checkpoint.ranked_tokens import MAX_SPECIAL, ranked, tokenizer_json
from moevlm.runtime.core.errors import CheckpointError, shown

TEKKEN = "tekken.json"

_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

# Of files up to version 7 that list none.
_OLDER = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_OLDER_VERSIONS = ("v1", "v2", "v3", "v7")


@dataclass(frozen=True)
class Tekken:
    """text: its tokenizer.json. named: the special tokens that have a name in Mistral's code, by that name."""

    text: str
    named: Mapping[str, str]


def of_tekken(directory: Path) -> Tekken:
    """tokenizer.json of the directory's tekken.json. Raises CheckpointError."""
    file = read_json(directory, TEKKEN)
    config, vocab = _of(file, "config", dict), _of(file, "vocab", list)
    special = _special(file, config)
    count = _of(config, "default_num_special_tokens", int, len(special))
    size = _of(config, "default_vocab_size", int, len(vocab) + count)
    if not (len(special) <= count <= MAX_SPECIAL and count <= size <= len(vocab) + count):
        raise CheckpointError(
            f"{TEKKEN}: default_vocab_size = {size} with default_num_special_tokens = {count} does not go with "
            f"{len(special)} special and {len(vocab)} other tokens (allowed: up to {MAX_SPECIAL} special ones)"
        )
    tokens = ranked(_entries(vocab[: size - count]), TEKKEN)
    special += [f"<SPECIAL_{token_id}>" for token_id in range(len(special), count)]
    if (ordinary := {text.encode() for text in special} & set(tokens)) or len(set(special)) < count:
        twice = min(ordinary).decode() if ordinary else next(text for text in special if special.count(text) > 1)
        raise CheckpointError(f"{TEKKEN}: the special token {shown(twice)} is there twice")
    text = tokenizer_json(tokens, count, _of(config, "pattern", str), dict(enumerate(special)))
    return Tekken(text, {name: text for name, text in _NAMED.items() if text in special})


def splitting_of(directory: Path) -> str | None:
    """The regular expression by which the directory's tekken.json splits texts; None if it has none."""
    config = read_json(directory, TEKKEN).get("config")
    pattern = config.get("pattern") if isinstance(config, dict) else None
    return pattern if isinstance(pattern, str) else None


def _special(file: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Special tokens, whose ids are their ranks: those that the file lists."""
    if file.get("special_tokens") is None:
        version = config.get("version")
        if version not in _OLDER_VERSIONS:
            raise CheckpointError(
                f"{TEKKEN} has no special_tokens (allowed: up to version v7; config.version = {shown(version)})"
            )
        return list(_OLDER)
    by_rank = {}
    for number, entry in enumerate(_of(file, "special_tokens", list)):
        rank, text = (entry.get(key) for key in ("rank", "token_str")) if isinstance(entry, dict) else (None, None)
        if type(rank) is not int or not isinstance(text, str) or not text:
            raise CheckpointError(f"{TEKKEN}: special_tokens[{number}] is not an object with rank and token_str")
        by_rank[rank] = text
        if len(by_rank) == number:
            raise CheckpointError(f"{TEKKEN}: special_tokens[{number}] is the second of rank {rank}")
    for rank in range(len(by_rank)):
        if rank not in by_rank:
            raise CheckpointError(f"{TEKKEN} has {len(by_rank)} special_tokens, and none of rank {rank}")
    return [by_rank[rank] for rank in range(len(by_rank))]


def _entries(vocab: list[Any]) -> Iterator[tuple[str, Any, Any]]:
    for number, entry in enumerate(vocab):
        if not isinstance(entry, dict):
            raise CheckpointError(f"{TEKKEN}: vocab[{number}] is not an object")
        yield f"vocab[{number}]", entry.get("token_bytes"), entry.get("rank")


def _of(values: Mapping[str, Any], field: str, kind: type, default: Any = None) -> Any:
    value = values.get(field)
    value = default if value is None else value
    if type(value) is not kind:
        names = {dict: "an object", list: "a list", int: "a number", str: "a text"}
        raise CheckpointError(f"{TEKKEN}: {field} = {shown(value)} (allowed: {names[kind]})")
    return value
