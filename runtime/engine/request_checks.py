"""Checks of a request's parameters that need more than the parameters themselves."""

from __future__ import annotations

import dataclasses
from time import monotonic

from moevlm.runtime.core.errors import RefusedOption, RequestError, one_line
from moevlm.runtime.request.sampling import SamplingOptions, SamplingParams
from moevlm.runtime.request.tokenizer import Tokenizer

MAX_SECONDS = 10**9  # longer than any process lives, and still a time that the system can wait for


def chosen_params(params: SamplingParams | None, otherwise: SamplingParams, options: SamplingOptions) -> SamplingParams:
    """`params`, or what counts without them, with `options` on top. Raises RequestError."""
    if params is not None and not isinstance(params, SamplingParams):
        raise RefusedOption("params", params, "SamplingParams")
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    for name in options:
        if name not in known:
            raise RequestError(f"unsupported option {one_line(name, 60)} (allowed: {', '.join(sorted(known))})")
    return (params or otherwise).updated(options)


def check_stops(params: SamplingParams, tokenizer: Tokenizer | None) -> None:
    """Raises RequestError for a stop that no text of this tokenizer can have."""
    if params.stop and tokenizer is None:
        raise RequestError("stop needs text, and the bundle has no tokenizer.json")
    special = tokenizer.special if tokenizer and params.skip_special_tokens else {}
    for stop in params.stop:
        if stop not in special and any(token in stop for token in special):
            allowed = "a special token alone, or text without one: they are left out of the text"
            raise RefusedOption("stop", stop, allowed)


def end_of(deadline: float | None) -> float | None:
    """On the clock of time.monotonic, from now. Raises RequestError."""
    if deadline is None:
        return None
    number = isinstance(deadline, (int, float)) and not isinstance(deadline, bool)
    if not (number and 0 < deadline <= MAX_SECONDS):  # written so that NaN fails
        raise RefusedOption("deadline", deadline, f"seconds, above 0 and up to {MAX_SECONDS}")
    return monotonic() + deadline
