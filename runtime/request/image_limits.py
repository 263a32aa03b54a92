"""Limits of the size of a request's images."""

from dataclasses import dataclass

from moevlm.runtime.core.errors import RefusedOption

LOW_DETAIL_PIXELS = 512 * 512  # of an image part with detail "low", as the OpenAI API has it


@dataclass(frozen=True)
class ImageLimits:
    """Limits of one image; None: as the checkpoint says.

    min_pixels, max_pixels: area of the resized image, where the processor's own limits are replaced. GLM-4V's
    longest_edge is temporal_patch_size times as much. max_tokens: the most that the image may take of the context.
    low_detail: at most LOW_DETAIL_PIXELS.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tokens: int | None = None
    low_detail: bool = False


NO_LIMITS = ImageLimits()


def require_pixels(name: str, value: object, least: int, unit: str, most: int) -> None:
    """Raise RefusedOption unless an area is a whole number of pixels from `least`, which is one `unit`, to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RefusedOption(name, value, f"{least}, which is one {unit}, to {most}")


def require_absent(name: str, value: object, why: str) -> None:
    """Raise RefusedOption for a limit that images of a model cannot have."""
    if value is not None:
        raise RefusedOption(name, value, f"none, for {why}")
