"""generation_config.json: the sampling that a model was released with, and what of it this runtime cannot do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moevlm.runtime.core.errors import CheckpointError, RequestError, shown
from moevlm.runtime.request.generation_file import FIELDS
from moevlm.runtime.request.sampling import SamplingParams

GENERATION_CONFIG = "generation_config.json"

# What transformers takes where a file that samples says nothing (GenerationConfig._get_default_generation_params).
_WHERE_SAMPLED = {"temperature": 1.0, "top_k": 50}

# Fields that change what is generated and are not supported, with the values at which they do nothing.
_IGNORED: dict[str, Any] = {
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "constraints": None,
    "diversity_penalty": 0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "frequency_penalty": 0,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "presence_penalty": 0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}


@dataclass(frozen=True)
class SamplingDefaults:
    """fields: of generation.json, those that differ from greedy. notes: what the user should know."""

    fields: Mapping[str, float]
    notes: tuple[str, ...] = ()


def sampling_defaults(config: Mapping[str, Any]) -> SamplingDefaults:
    """config: generation_config.json. Without `do_sample` it is greedy, whatever else it says, as in transformers.

    Raises CheckpointError for a value that is not allowed.
    """
    samples = config.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise CheckpointError(
            f"invalid value in {GENERATION_CONFIG}: do_sample = {shown(samples)} (allowed: true, false)"
        )
    given = {name: config[name] for name in FIELDS if config.get(name) is not None}
    if samples:
        given = _WHERE_SAMPLED | given
    else:
        given = {name: value for name, value in given.items() if name == "repetition_penalty"}
    try:
        params = SamplingParams(**given)
    except RequestError as error:
        raise CheckpointError(f"{GENERATION_CONFIG}: {error}") from error
    greedy = SamplingParams()
    values = {name: getattr(params, name) for name in FIELDS}
    fields = {name: value for name, value in values.items() if value != getattr(greedy, name)}
    ignored = [
        f"{name} = {shown(config[name])}"
        for name, neutral in _IGNORED.items()
        if config.get(name) not in (None, neutral, [], {})
    ]
    notes = (f"{GENERATION_CONFIG}: not supported, ignored: {', '.join(ignored)}",) if ignored else ()
    return SamplingDefaults(fields, notes)
