"""One image of a prompt, or slice of a video: what names it, and what encodes it when its tokens are computed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moevlm.runtime.engine.pages import KEY_BYTES
from moevlm.runtime.request.images.slices import Slice

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PromptImage:
    """digest: hash of mode, size and pixels as the encoder sees them. tokens: its rows of visual features.

    pixels: of `mode`, bytes row by row, frame after frame. frames: of a slice; 0 for an image.
    """

    digest: bytes
    tokens: int
    mode: str
    size: tuple[int, int]
    pixels: bytes
    frames: int = 0

    @classmethod
    def of(cls, image: Image | Slice, tokens: int) -> PromptImage:
        """image: resized to whole patches."""
        pixels, frames = image.tobytes(), len(image.frames) if isinstance(image, Slice) else 0
        name = f"{image.mode} {image.width} {image.height} {frames} ".encode()
        digest = hashlib.blake2b(name + pixels, digest_size=KEY_BYTES).digest()
        return cls(digest, tokens, image.mode, image.size, pixels, frames)

    def image(self) -> Image | Slice:
        """As it was given."""
        from PIL import Image

        if not self.frames:
            return Image.frombytes(self.mode, self.size, self.pixels)
        size = len(self.pixels) // self.frames
        parts = (self.pixels[i * size : (i + 1) * size] for i in range(self.frames))
        return Slice(tuple(Image.frombytes(self.mode, self.size, part) for part in parts))
