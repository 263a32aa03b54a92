"""One image of a prompt: what names it, and what encodes it when its tokens are computed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moevlm.runtime.engine.pages import KEY_BYTES

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PromptImage:
    """digest: hash of mode, size and pixels as the encoder sees them. tokens: its rows of visual features.

    pixels: of `mode`, bytes row by row.
    """

    digest: bytes
    tokens: int
    mode: str
    size: tuple[int, int]
    pixels: bytes

    @classmethod
    def of(cls, image: Image, tokens: int) -> PromptImage:
        """image: resized to whole patches."""
        pixels = image.tobytes()
        name = f"{image.mode} {image.width} {image.height} ".encode()
        digest = hashlib.blake2b(name + pixels, digest_size=KEY_BYTES).digest()
        return cls(digest, tokens, image.mode, image.size, pixels)

    def image(self) -> Image:
        """As it was given."""
        from PIL import Image

        return Image.frombytes(self.mode, self.size, self.pixels)
