"""Limits of the size of a request's images."""

from dataclasses import dataclass

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
