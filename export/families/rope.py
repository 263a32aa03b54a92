"""Rotary embedding fields of config.json: the new `rope_parameters` and the older `rope_scaling` with `rope_theta`."""

from moevlm.export.families.fields import Fields
from moevlm.runtime.errors import CheckpointError
from moevlm.runtime.manifest import RopeFacts


def mrope(text: Fields, head_dim: int, *, interleaved: bool, default_sections: tuple[int, int, int]) -> RopeFacts:
    """Multimodal rope with (time, height, width) sections. Raises UnsupportedModelError for a scaled variant."""
    if "rope_parameters" in text:
        rope = text.sub("rope_parameters")
        theta = rope.number("rope_theta")
    else:
        rope = text.sub("rope_scaling", {})
        theta = text.number("rope_theta")
    # Older files say "mrope" or "default" under "type"; both are unscaled.
    rope.choice("type", ("default", "mrope"), "default")
    rope.choice("rope_type", ("default", "mrope"), "default")
    rope.choice("mrope_interleaved", (interleaved,), interleaved)
    partial = rope.number("partial_rotary_factor", text.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * partial)
    sections = rope.counts("mrope_section", default_sections)
    if len(sections) != 3 or sum(sections) != dim // 2:
        given = f"invalid value in config.json: mrope_section = {list(sections)}"
        raise CheckpointError(f"{given} (three numbers that add up to {dim // 2})")
    return RopeFacts(dim=dim, theta=theta, sections=sections, interleaved=interleaved)


def axial_theta(vision: Fields) -> float:
    """The base of the vision tower's 2-axis rope; releases before transformers 5 leave it out and mean 10000."""
    if "rope_parameters" not in vision:
        return 10000.0
    rope = vision.sub("rope_parameters")
    rope.choice("rope_type", ("axial",), "axial")
    return rope.number("rope_theta", 10000.0)
