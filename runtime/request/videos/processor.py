"""What every video processor does: frames sampled and resized within limits, and cut into slices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import RequestError, shown
from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.request.image_limits import ImageLimits, require_pixels
from moevlm.runtime.request.images.edges import blocks_within, enlarged, read_edges, require_aspect
from moevlm.runtime.request.images.fields import VIDEO_FILE, pixel_values, read_fields, refuse
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.images.slices import Slice
from moevlm.runtime.request.messages import GivenVideo
from moevlm.runtime.request.videos.clip import USUAL_FPS, Clip, FrameList
from moevlm.runtime.request.videos.file_clip import FileClip

_MAX_EDGE = 1 << 53
_FIELDS = {"video_processor_type", "size", "fps", "do_sample_frames", "num_frames", "max_image_size"}
# Either about what is returned, or what the reference's classes of other models read.
_WITHOUT_EFFECT = {"return_metadata", "video_metadata", "crop_size", "pad_size", "do_center_crop", "do_pad"}


@dataclass(frozen=True)
class PlannedVideo:
    """A video of which no frame is kept yet. Its frames are decoded by `slices`.

    indices: of the frames that are taken, a multiple of `copies`. times: of each slice, in words. text_first: whether
    they stand before the slice. size: (width, height) that frames are resized to.
    """

    clip: Clip
    indices: tuple[int, ...]
    copies: int
    times: tuple[str, ...]
    text_first: bool
    size: tuple[int, int]
    slice_tokens: int
    resample: Image.Resampling

    @property
    def tokens(self) -> int:
        """Visual tokens of all slices."""
        return len(self.times) * self.slice_tokens

    def texts(self) -> Iterator[tuple[str, int, str]]:
        """(text before, visual tokens, text behind) of each slice."""
        for time in self.times:
            yield (time, self.slice_tokens, "") if self.text_first else ("", self.slice_tokens, time)

    def slices(self) -> list[Slice]:
        """Decode and resize. Raises RequestError."""
        frames = [frame.resize(self.size, self.resample) for frame in self.clip.read(self.indices)]
        return [Slice(tuple(frames[i : i + self.copies])) for i in range(0, len(frames), self.copies)]


class VideoProcessor(ABC):
    """Plans videos; made by `registry.video_processor`. Frames become patches as the image processor's do.

    KNOWN: fields of its own. SIZES: see ImageProcessor. EDGES: shortest_edge and longest_edge of a whole video's area
    where the fields do not say. MEAN, DEVIATION: of pixels, likewise. TEXT_FIRST: see PlannedVideo.
    """

    KNOWN: ClassVar[set[str]]
    EDGES: ClassVar[tuple[int, int]]
    SIZES: ClassVar[Mapping[str, tuple[int, str]]]
    MEAN: ClassVar[tuple[float, float, float]]
    DEVIATION: ClassVar[tuple[float, float, float]]
    TEXT_FIRST: ClassVar[bool]

    def __init__(self, preprocessor: Mapping[str, Any], vision: GridTower, images: ImageProcessor) -> None:
        """See `registry.video_processor`."""
        given = {name: value for name, value in preprocessor.items() if name not in _WITHOUT_EFFECT}
        self._fields = read_fields(given, _FIELDS | self.KNOWN, self.SIZES, vision, VIDEO_FILE)
        if self._fields.get("do_sample_frames", True) is not True:
            refuse("do_sample_frames", self._fields["do_sample_frames"], "true", VIDEO_FILE)
        self._vision, self.images = vision, images
        self._copies, self._block = vision.temporal_patch_size, vision.patch_size * vision.merge_size
        self._fps = self._number("fps", 2)
        self._resample = Image.Resampling(self._fields.get("resample", Image.Resampling.BICUBIC))
        if self._resample not in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            refuse("resample", int(self._resample), "2, 3", VIDEO_FILE)
        self._shortest, self._longest = read_edges(self._fields, self.EDGES, VIDEO_FILE)
        values = pixel_values(self._fields, True, self.MEAN, self.DEVIATION, VIDEO_FILE)
        if not np.array_equal(values, images.values):  # one encoder takes both
            refuse("image_mean, image_std, rescale_factor", "others", "those of preprocessor.json", VIDEO_FILE)

    def plan(self, given: GivenVideo) -> PlannedVideo:
        """Which frames of a video are taken, and how large. Raises RequestError for what is no video."""
        clip = self._clip(given)
        most = min(defaults.MAX_VIDEO_FRAMES, given.max_frames or defaults.MAX_VIDEO_FRAMES)
        indices = self._sampled(clip, most)
        if len(indices) < self._copies:
            raise RequestError(f"{clip.name} has {len(indices)} frames (allowed: {self._copies} or more)")
        width, height = self._resized(len(indices), clip, given.limits)
        indices += [indices[-1]] * (-len(indices) % self._copies)
        return PlannedVideo(
            clip,
            tuple(indices),
            self._copies,
            tuple(self._times(indices, clip.fps)),
            self.TEXT_FIRST,
            (width, height),
            width * height // self._block**2,
            self._resample,
        )

    @abstractmethod
    def _sampled(self, clip: Clip, most: int) -> list[int]:
        """The frames that are taken, rising, at most `most`."""

    @abstractmethod
    def _times(self, indices: Sequence[int], fps: float) -> Iterator[str]:
        """What a prompt says of the time of each slice. indices: whole slices."""

    def _longest_of(self, frames: int) -> int:
        """The largest area of so many frames together."""
        del frames
        return self._longest

    def _clip(self, given: GivenVideo) -> Clip:
        if isinstance(given.source, (list, tuple)):
            return FrameList.of(self.images, given.source, given.fps or USUAL_FPS, defaults.MAX_LISTED_FRAMES)
        if given.fps is not None:
            raise RequestError(f"fps = {shown(given.fps)} is of a list of images: a video file says its own")
        return FileClip.of(given.source)

    def _resized(self, frames: int, clip: Clip, limits: ImageLimits) -> tuple[int, int]:
        """The size nearest to the clip's with sides of whole blocks and an area of all frames within the edges."""
        block, copies = self._block, self._copies
        width, height = clip.size
        shortest, longest = self._shortest, self._longest_of(frames)
        if (most := self._most_pixels(limits)) is not None:
            longest = min(longest, most * frames)
            shortest = min(shortest, longest)
        size = f"{clip.name} is {width} x {height} pixels"
        height, width = enlarged(height, width, block)
        require_aspect(height, width, size)
        counted = round(frames / copies) * copies
        rows, columns = blocks_within(height, width, block, (shortest, longest), frames, counted)
        if most is not None and rows * columns * block**2 > most:
            rows, columns = self._within(rows, columns, most // block**2)
        return columns * block, rows * block

    @staticmethod
    def _within(rows: int, columns: int, most: int) -> tuple[int, int]:
        """The longer side cut until the product is at most `most`."""
        while rows * columns > most:
            rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
        return rows, columns

    def _most_pixels(self, limits: ImageLimits) -> int | None:
        """The most pixels of a frame that a request allows."""
        found, given = [], limits.max_pixels
        if given is not None:
            require_pixels("max_pixels", given, self._block**2, "token", _MAX_EDGE)
            found.append(given)
        if (tokens := self.images.most_tokens(limits)) is not None:
            found.append(tokens * self._block**2)
        return min(found, default=None)

    def _number(self, name: str, default: float, least: float = 1e-3, most: float = 1e6) -> float:
        value = self._fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            refuse(name, value, f"a number from {least:g} to {most:g}", VIDEO_FILE)
        return float(value)

    def _count(self, name: str, default: int) -> int:
        value = self._number(name, default, 1)
        if value != int(value):
            refuse(name, value, "a whole number", VIDEO_FILE)
        return int(value)
