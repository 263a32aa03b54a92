"""Which tokens end an answer: what generation_config.json says, else config.json, else the tokenizer."""

from collections.abc import Mapping
from typing import Any

from moevlm.export.generation_config import GENERATION_CONFIG
from moevlm.runtime.errors import CheckpointError, shown
from moevlm.runtime.manifest import ModelFacts


def end_tokens(generation: Mapping[str, Any], model: ModelFacts, of_tokenizer: int | None) -> tuple[int, ...]:
    """The ids, at least one, all inside the vocabulary.

    generation: generation_config.json, which says what the model was tuned to end with, while config.json often names
    one token. model: facts out of config.json. of_tokenizer: the id of its eos_token.
    Raises CheckpointError for an id that is none, and where no file names one: an answer would never end.
    """
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    where = GENERATION_CONFIG
    if not ids:
        ids, where = list(model.eos_token_ids), "config.json"
    if not ids:
        ids, where = [] if of_tokenizer is None else [of_tokenizer], "tokenizer_config.json"
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
    return tuple(dict.fromkeys(ids))
