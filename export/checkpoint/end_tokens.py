"""Which tokens end an answer: what generation_config.json says, else config.json, else the tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moevlm.export.checkpoint.generation_config import GENERATION_CONFIG
from moevlm.runtime.core.errors import CheckpointError, shown
from moevlm.runtime.core.manifest import ModelMetadata


@dataclass(frozen=True)
class EndTokens:
    """ids: all inside the vocabulary, none only where there is no tokenizer. note: what the user should know, or ""."""

    ids: tuple[int, ...]
    note: str = ""


def end_tokens(
    generation: Mapping[str, Any], model: ModelMetadata, of_tokenizer: int | None, tokenizer: bool = True
) -> EndTokens:
    """generation: generation_config.json, which says what the model was tuned to end with; config.json often names one
    token. model: metadata out of config.json. tokenizer: whether there is one. of_tokenizer: the id of its eos_token.

    Raises CheckpointError for an id that is none, and where no file names one though the checkpoint has a tokenizer: a
    conversation would never end.
    """
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    where, note = GENERATION_CONFIG, ""
    if not ids:
        ids, where = list(model.eos_token_ids), "config.json"
    if not ids and of_tokenizer is not None:
        ids, where = [of_tokenizer], "tokenizer_config.json"
        note = f"no file has an eos_token_id: answers end with the tokenizer's eos_token, {of_tokenizer}"
    if not ids and not tokenizer:
        return EndTokens((), "no file has an eos_token_id: answers end after max_new_tokens")
    if not ids:
        raise CheckpointError(
            f"no end token: neither {GENERATION_CONFIG} nor config.json has an eos_token_id, nor tokenizer_config.json "
            f"an eos_token, so no answer would end (name one in {GENERATION_CONFIG})"
        )
    for i in ids:
        if type(i) is not int or not 0 <= i < model.vocabulary:
            raise CheckpointError(
                f"invalid value in {where}: eos_token_id = {shown(ids if len(ids) > 1 else i)} "
                f"(allowed: token ids from 0 to {model.vocabulary - 1})"
            )
    if of_tokenizer is not None and of_tokenizer not in ids:
        note = f"the tokenizer's eos_token, {of_tokenizer}, does not end answers: eos_token_id of {where} is {ids}"
    return EndTokens(tuple(dict.fromkeys(ids)), note)
