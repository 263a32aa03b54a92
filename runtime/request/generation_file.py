"""generation.json: the sampling that the model was released with, which requests start from."""

from __future__ import annotations

from moevlm.runtime.core.errors import BundleError, RequestError, one_line
from moevlm.runtime.core.json_object import json_object
from moevlm.runtime.request.sampling import SamplingParams

GENERATION = "generation.json"
FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def released_sampling(text: str | None) -> SamplingParams:
    """The sampling of a request that asks for none. text: generation.json's, None for a bundle without: greedy.

    Raises BundleError for a file that is damaged or has other fields than FIELDS.
    """
    if text is None:
        return SamplingParams()
    fields = json_object(text, GENERATION, BundleError)
    for name in fields:
        if name not in FIELDS:
            raise BundleError(
                f"unsupported field in {GENERATION}: {one_line(name, 60)} (supported: {', '.join(FIELDS)})"
            )
    try:
        return SamplingParams(**fields)
    except RequestError as error:
        raise BundleError(f"{GENERATION}: {error}") from error


def sampling_text(sampling: SamplingParams) -> str:
    """For people: greedy, or what differs from it."""
    greedy = SamplingParams()
    names = FIELDS if sampling.temperature else ("repetition_penalty",)
    changed = [name for name in names if getattr(sampling, name) != getattr(greedy, name)]
    told = [f"{name.replace('_', ' ')} {getattr(sampling, name):g}" for name in changed]
    return ", ".join(told if sampling.temperature else ["greedy", *told])
