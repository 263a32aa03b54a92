"""A video before its frames are chosen: how many there are, and those that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moevlm.runtime.core.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

    from moevlm.runtime.request.images.processor import ImageProcessor

USUAL_FPS = 24.0  # of frames whose rate nobody says, as the reference takes it


class Clip(Protocol):
    """name: in messages. frames: how many. fps: of them. seconds: None where only frames and fps say it.

    size: (width, height) of each frame.
    """

    @property
    def name(self) -> str: ...
    @property
    def frames(self) -> int: ...
    @property
    def fps(self) -> float: ...
    @property
    def seconds(self) -> float | None: ...
    @property
    def size(self) -> tuple[int, int]: ...

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """RGB frames, one at a time. indices: rising, those that come twice are given twice. Raises RequestError."""
        ...


@dataclass(frozen=True)
class FrameList:
    """A list of images, opened as images of a request are."""

    images: ImageProcessor
    sources: Sequence[Any]
    fps: float
    size: tuple[int, int]
    name: str = "video"
    seconds: float | None = None

    @classmethod
    def of(cls, images: ImageProcessor, sources: Sequence[Any], fps: float, most: int) -> FrameList:
        """most: frames of a list. Raises RequestError."""
        if not 1 <= len(sources) <= most:
            raise RequestError(f"a video is a list of {len(sources)} frames (allowed: 1 to {most})")
        kept = [images.repeatable(source) for source in sources]
        return cls(images, kept, fps, images.open(kept[0]).size)

    @property
    def frames(self) -> int:
        return len(self.sources)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        for index in indices:
            frame = self.images.open(self.sources[index])
            if frame.size != self.size:
                raise RequestError(
                    f"frame {index + 1} of a video is {frame.width} x {frame.height} pixels, the first "
                    f"{self.size[0]} x {self.size[1]} (allowed: one size)"
                )
            yield frame
