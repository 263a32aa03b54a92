"""Rotary embedding fields of config.json: the new `rope_parameters` and the older `rope_scaling` with `rope_theta`."""

from moevlm.export.families.fields import Fields
from moevlm.runtime.core.manifest import RopeMetadata


def mrope(
    text: Fields,
    head_dim: int,
    *,
    interleaved: bool,
    default_sections: tuple[int, int, int],
    default_partial: float | None = None,
) -> RopeMetadata:
    """Multimodal rope with (time, height, width) sections. Raises UnsupportedModelError for a scaled variant.

    default_partial: `partial_rotary_factor` where config.json has none; None for a family that rotates whole heads.
    """
    rope = text.sub("rope_parameters") if "rope_parameters" in text else text.sub("rope_scaling", {})
    if "rope_theta" in rope:
        theta = rope.number("rope_theta")
        text.choice("rope_theta", (theta,), theta)  # the older place, beside the new one
    else:
        theta = text.number("rope_theta")
    _check_type(rope, ("default",))
    for name in ("mrope_interleaved", "interleaved"):
        rope.choice(name, (interleaved,), interleaved)
    if default_partial is None:
        partial = 1.0
        for part in (rope, text):
            part.choice("partial_rotary_factor", (partial,), partial)
    else:
        partial = rope.number("partial_rotary_factor", text.number("partial_rotary_factor", default_partial))
    dim = int(head_dim * partial)
    if dim % 2 or not 0 < dim <= head_dim:
        rotated = f"{dim} of its dimensions rotate, allowed: an even number from 2 to {head_dim}"
        raise text.invalid("head_dim", head_dim, rotated)
    sections = rope.counts("mrope_section", default_sections)
    if len(sections) != 3 or sum(sections) != dim // 2:
        raise rope.invalid("mrope_section", list(sections), f"three numbers that add up to {dim // 2}")
    return RopeMetadata(dim=dim, theta=theta, sections=sections, interleaved=interleaved)


def one_axis(rope: Fields, head_dim: int) -> RopeMetadata:
    """Rope on counted positions: of whole heads, or "proportional" (partial_rotary_factor of the frequencies turn).

    Raises UnsupportedModelError for a scaled variant.
    """
    proportional = rope.choice("rope_type", ("default", "proportional"), "default") == "proportional"
    if not proportional:
        rope.choice("partial_rotary_factor", (1.0,), 1.0)
    rope.choice("factor", (1.0,), 1.0)
    partial = rope.number("partial_rotary_factor", 1.0)
    turning = int(partial * head_dim // 2)
    if not 0 < turning <= head_dim // 2:
        raise rope.invalid(
            "partial_rotary_factor", partial, f"1 to {head_dim // 2} frequencies turn, and not {turning}"
        )
    return RopeMetadata(dim=head_dim, theta=rope.number("rope_theta"), turning=turning % (head_dim // 2))


def axial_theta(vision: Fields, default: float = 10000.0) -> float:
    """The base of the vision tower's 2-axis rope. default: where config.json has none, as before transformers 5."""
    if "rope_parameters" not in vision:
        return vision.number("rope_theta", default)
    rope = vision.sub("rope_parameters")
    _check_type(rope, ("axial", "default"))  # transformers reads "default" as axial here
    return rope.number("rope_theta", default)


def _check_type(rope: Fields, allowed: tuple[str, ...]) -> None:
    """`type` is the older name of rope_type; beside a rope_type, transformers does not read it."""
    rope.choice("rope_type" if "rope_type" in rope else "type", allowed, "default")
    rope.get("type", None)
