"""Rotary embedding fields of config.json: the new `rope_parameters` and the older `rope_scaling` with `rope_theta`."""

import numpy as np
from msgspec import structs

from moevlm.export.families.fields import Fields
from moevlm.export.families.rope_scaling import KINDS, Rope
from moevlm.runtime.core.manifest import RopeMetadata
from moevlm.runtime.core.rotary import inverse_frequencies

_FASTEST = 1 << 20  # radians a position, far more than any model has


def one_axis(
    text: Fields, head_dim: int, *, rope: Fields | None = None, default_partial: float | None = None
) -> RopeMetadata:
    """Rope on counted positions, plain or scaled.

    rope: where its fields stand, if a model has several; else they are those of `text`. default_partial: see `mrope`.
    """
    rope = rope_fields(text) if rope is None else rope
    return _rope(text, rope, head_dim, default_partial)


def mrope(
    text: Fields,
    head_dim: int,
    *,
    interleaved: bool,
    default_sections: tuple[int, int, int],
    default_partial: float | None = None,
) -> RopeMetadata:
    """Multimodal rope with (time, height, width) sections, plain or scaled.

    default_partial: `partial_rotary_factor` where config.json has none; None for a family that rotates whole heads.
    """
    rope = rope_fields(text)
    for name in ("mrope_interleaved", "interleaved"):
        rope.choice(name, (interleaved,), interleaved)
    plain = _rope(text, rope, head_dim, default_partial)
    sections = rope.counts("mrope_section", default_sections)
    if len(sections) != 3 or sum(sections) != plain.dim // 2:
        raise rope.invalid("mrope_section", list(sections), f"three numbers that add up to {plain.dim // 2}")
    return structs.replace(plain, sections=sections, interleaved=interleaved)


def rope_fields(text: Fields) -> Fields:
    """The object with a text model's rope, which is empty if only its theta is said. Raises CheckpointError for two."""
    if "rope_parameters" not in text:
        return text.sub("rope_scaling", {}, nulls=False)
    if "rope_scaling" in text:  # transformers takes this one, whole: without the theta of the other
        value = text.get("rope_scaling")
        raise text.invalid("rope_scaling", value, "none beside rope_parameters, where its fields belong")
    return text.sub("rope_parameters", nulls=False)


def axial_theta(vision: Fields, default: float = 10000.0) -> float:
    """The base of the vision tower's 2-axis rope. default: where config.json has none, as before transformers 5."""
    if "rope_parameters" not in vision:
        return vision.number("rope_theta", default)
    rope = vision.sub("rope_parameters", nulls=False)
    _kind(rope, ("axial", "default"))  # transformers reads "default" as axial here
    return rope.number("rope_theta", default)


def _rope(text: Fields, rope: Fields, head_dim: int, default_partial: float | None) -> RopeMetadata:
    kind, theta = _kind(rope, tuple(KINDS)), _theta(text, rope)
    dim = head_dim
    if kind != "proportional":
        dim = int(head_dim * _partial(text, rope, default_partial))
        if dim % 2 or not 0 < dim <= head_dim:
            rotating = f"an even number of rotating dimensions from 2 to {head_dim}, here {dim}"
            raise text.invalid("head_dim", head_dim, rotating)
    with np.errstate(all="ignore"):
        frequencies, factor = KINDS[kind](Rope(rope, text, dim, theta))
    if frequencies is not None and not (frequencies <= _FASTEST).all():
        told = f"frequencies up to {_FASTEST}, with these numbers one is {frequencies.max():.1e}"
        raise rope.invalid("rope_type", kind, told)
    if frequencies is None or np.array_equal(frequencies, inverse_frequencies(dim, theta)):
        return RopeMetadata(dim=dim, theta=theta, factor=factor)
    return RopeMetadata(dim=dim, theta=theta, frequencies=tuple(frequencies.tolist()), factor=factor)


def _theta(text: Fields, rope: Fields) -> float:
    if "rope_theta" not in rope:
        return text.number("rope_theta")
    theta = rope.number("rope_theta")
    text.choice("rope_theta", (theta,), theta)  # the older place, beside the new one
    return theta


def _partial(text: Fields, rope: Fields, default: float | None) -> float:
    """How much of a head rotates."""
    if default is not None:
        return rope.number("partial_rotary_factor", text.number("partial_rotary_factor", default))
    for part in (rope, text):
        part.choice("partial_rotary_factor", (1.0,), 1.0)
    return 1.0


def _kind(rope: Fields, allowed: tuple[str, ...]) -> str:
    """`type` is the older name of rope_type; beside a rope_type, transformers does not read it."""
    found: str = rope.choice("rope_type" if "rope_type" in rope else "type", allowed, "default")
    rope.get("type", None)
    return found
