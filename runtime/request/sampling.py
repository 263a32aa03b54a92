"""How to choose the tokens of a request: its parameters, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import RefusedOption

MAX_TOKENS = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
MIN_PENALTY = 1e-3  # far below, logits leave float32
NARROWING = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Raises RequestError that names the field, its value and what is allowed.

    None stands for the default of any of them. max_new_tokens: 256 by default. temperature: 0 is greedy; then top_k,
    top_p and min_p, which would have no effect, are refused. top_k: 0 is off. top_p: 1 is off.
    min_p: 0 is off. repetition_penalty: 1 is off; it counts the prompt's tokens too, as Hugging Face does.
    seed: the same one gives the same text; by default a fresh one is drawn. stop: the text ends before whichever of
    these strings is complete first; one may be a special token.
    logprobs: None for none at all, else how many alternatives to report beside each chosen token.
    skip_special_tokens: leave special tokens, such as markers of thoughts, out of the text.
    ignore_eos: go on until max_new_tokens, for benchmarks.
    """

    max_new_tokens: int = defaults.MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    skip_special_tokens: bool = True
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None:
                object.__setattr__(self, field.name, field.default)
        self._whole("max_new_tokens", 1, MAX_TOKENS)
        self._number("temperature", 0, 100)
        self._whole("top_k", 0, MAX_TOKENS)
        self._number("top_p", 0, 1, open_low=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", MIN_PENALTY, 100)
        if self.seed is not None:
            self._whole("seed", 0, 2**63 - 1)
        if self.logprobs is not None:
            self._whole("logprobs", 0, MAX_LOGPROBS)
        for name in ("skip_special_tokens", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "true or false")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or len(stop) > MAX_STOPS:
            self._refuse("stop", f"at most {MAX_STOPS} strings")
        for text in stop:
            if not (isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARACTERS):
                raise RefusedOption("stop", text, f"text of 1 to {MAX_STOP_CHARACTERS} characters")
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise RefusedOption("stop", text, "Unicode text: a lone surrogate never occurs")
        object.__setattr__(self, "stop", tuple(stop))
        if self.temperature == 0:
            for name in NARROWING:
                if getattr(self, name) != getattr(type(self), name):
                    self._refuse(name, "with a temperature above 0: at 0 the likeliest token is taken")

    def updated(self, options: SamplingOptions) -> SamplingParams:
        """These with other values for some options; None leaves one as it is.

        A temperature of 0 switches off what narrows the choice here, unless it is among the options, too.
        """
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if given.get("temperature") == 0:
            given = {name: getattr(type(self), name) for name in NARROWING} | given
        return dataclasses.replace(self, **given)

    def _whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            self._refuse(name, f"a whole number from {low} to {high}")
        object.__setattr__(self, name, int(value))

    def _number(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        good = not isinstance(value, bool) and isinstance(value, (int, float, np.integer, np.floating))
        # Written so that NaN fails.
        if not (good and low <= value <= high and not (open_low and value == low)):
            self._refuse(name, f"a number above {low}, up to {high}" if open_low else f"a number from {low} to {high}")
        object.__setattr__(self, name, float(value))

    def _refuse(self, name: str, allowed: str) -> None:
        raise RefusedOption(name, getattr(self, name), allowed)


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments; None is as good as absent."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    skip_special_tokens: bool | None
    ignore_eos: bool | None
