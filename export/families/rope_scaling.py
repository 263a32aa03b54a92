"""Scaled rope: the inverse frequencies where they are not theta's own, and the factor on cosine and sine.

Source: transformers 5.24 `modeling_rope_utils.py`. Each step is rounded to float32 there, and here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moevlm.export.families.fields import Fields
from moevlm.runtime.core.rotary import inverse_frequencies, rotary_powers


@dataclass(frozen=True)
class Rope:
    """What a variant is computed from. fields: its own. text: where the lengths of contexts stand. dim: that rotate."""

    fields: Fields
    text: Fields
    dim: int
    theta: float

    @property
    def original(self) -> int:
        """The context of the first training. Phi 3's place, beside the rope's fields, goes first."""
        name = "original_max_position_embeddings"
        return self.text.positive(name, self.fields.positive(name, self.context))

    @property
    def context(self) -> int:
        """The model's context."""
        return self.text.positive("max_position_embeddings")

    @property
    def factor(self) -> float:
        """How much longer it is, as the rope says or as it is."""
        return self.fields.number("factor", self.context / self.original)

    @property
    def own(self) -> np.ndarray:
        """Theta's own frequencies."""
        return inverse_frequencies(self.dim, self.theta)


# (frequencies [dim / 2] float32, None for theta's own; factor on cosine and sine)
Scaling = tuple[np.ndarray | None, float]


def _default(_: Rope) -> Scaling:
    return None, 1.0


def _linear(given: Rope) -> Scaling:
    """All frequencies by `factor`, as if positions were (kaiokendev)."""
    return given.own / np.float32(given.fields.number("factor")), 1.0


def _dynamic(given: Rope) -> Scaling:
    """Another theta for sequences longer than max_position_embeddings (NTK); no bundle's context is longer."""
    given.fields.number("factor")
    return None, 1.0


def _proportional(given: Rope) -> Scaling:
    """Of all frequencies, the first `partial_rotary_factor` turn, the others are 0 (Gemma 4)."""
    partial, pairs = given.fields.number("partial_rotary_factor", 1.0), given.dim // 2
    turning = int(partial * given.dim // 2)
    if not 0 < turning <= pairs:
        told = f"a part of which 1 to {pairs} frequencies turn, here {turning}"
        raise given.fields.invalid("partial_rotary_factor", partial, told)
    frequencies = given.own
    frequencies[turning:] = 0
    return frequencies / np.float32(given.fields.number("factor", 1.0)), 1.0


def _yarn(given: Rope) -> Scaling:
    """High frequencies stay, low ones are divided by `factor`, a ramp between (YaRN, sections 3.2 to 3.4)."""
    fields, dim, factor = given.fields, given.dim, given.factor
    if given.theta <= 1:
        raise fields.invalid("rope_theta", given.theta, "more than 1")
    low, high = (
        dim * math.log(given.original / (fields.number(turns, usual) * 2 * math.pi)) / (2 * math.log(given.theta))
        for turns, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))  # within the original context
    )
    if fields.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    powers = rotary_powers(dim, given.theta)
    stretched = np.float32(1) / (np.float32(factor) * powers)
    return stretched * (np.float32(1) - kept) + np.float32(1) / powers * kept, _yarn_factor(fields, factor)


def _yarn_factor(rope: Fields, factor: float) -> float:
    """0.1 ln(factor) + 1 (YaRN, equation 22); of DeepSeek, whose softmax has a scale of its own, a ratio of two."""
    mscale, all_dims = (rope.number(key) if rope.get(key, 0) else 0.0 for key in ("mscale", "mscale_all_dim"))
    if "attention_factor" in rope:
        return rope.number("attention_factor")
    if mscale and all_dims:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dims)
    return yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """How much yarn lengthens what it rotates for a context longer by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(given: Rope) -> Scaling:
    """Each frequency by its own factor: two tables, the second beyond the original context (LongRoPE).

    A context that needs both is refused: keys of early tokens would have to turn with either.
    """
    fields, original, factor = given.fields, given.original, given.factor
    if given.context > original:
        allowed = f"up to original_max_position_embeddings = {original}: longrope has other frequencies beyond it"
        raise given.text.invalid("max_position_embeddings", given.context, allowed)
    if original < 2:
        raise given.text.invalid("max_position_embeddings", given.context, "2 or more with longrope")
    fields.get("long_factor", None)  # of longer sequences
    usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short = np.array(fields.numbers("short_factor", given.dim // 2), np.float32)
    return np.float32(1) / (short * rotary_powers(given.dim, given.theta)), fields.number("attention_factor", usual)


def _llama3(given: Rope) -> Scaling:
    """Long wavelengths are multiplied by `factor`, short ones stay, those between are mixed (Llama 3.1).

    None are between where the factors of low and high frequencies are equal (Llama 4).
    """
    fields, original, plain = given.fields, given.original, given.own
    factor = np.float32(fields.number("factor"))
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high < low:
        raise fields.invalid("high_freq_factor", high, f"low_freq_factor = {low} or more")
    one = np.float32(1)  # PyTorch divides a number by a tensor in two steps
    wavelength = one / plain * np.float32(2 * math.pi)
    smooth = (one / wavelength * np.float32(original) - np.float32(low)) / np.float32(high - low or 1)
    mixed = (one - smooth) * plain / factor + smooth * plain
    is_long, is_short = wavelength > np.float32(original / low), wavelength < np.float32(original / high)
    return np.where(is_long, plain / factor, np.where(is_short, plain, mixed)), 1.0


KINDS: Mapping[str, Callable[[Rope], Scaling]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
