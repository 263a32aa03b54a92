"""What becomes one grid of patches: an image, or some frames of a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Slice:
    """Frames of a video, a frame for each temporal copy of a patch. Has what the encoder asks an image for.

    frames: of one mode and size, resized to whole blocks of patches.
    """

    frames: tuple[Image, ...]

    @property
    def mode(self) -> str:
        return self.frames[0].mode

    @property
    def size(self) -> tuple[int, int]:
        return self.frames[0].size

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def tobytes(self) -> bytes:
        """Pixels, frame after frame."""
        return b"".join(frame.tobytes() for frame in self.frames)


def frames_of(visual: Image | Slice) -> tuple[Image, ...]:
    """The frames of a slice; an image is one."""
    return visual.frames if isinstance(visual, Slice) else (visual,)
