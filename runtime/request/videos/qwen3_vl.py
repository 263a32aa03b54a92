"""The video processor of Qwen3-VL: frames at a rate, evenly, and the time before each slice.

Numerically that of Hugging Face transformers 5.24, with its own number of pixels for a frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.request.images.fields import VIDEO_FILE, grid_sizes, refuse
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.videos.clip import Clip
from moevlm.runtime.request.videos.processor import VideoProcessor


class Qwen3VLVideos(VideoProcessor):
    """Qwen3VLVideoProcessor."""

    KNOWN: ClassVar = {"min_frames", "max_frames", "cap_pixels_per_frame", "max_video_tokens"}
    EDGES: ClassVar = (128 * 32 * 32, 32 * 32 * 768)
    SIZES: ClassVar = grid_sizes(16)
    MEAN: ClassVar = (0.5, 0.5, 0.5)
    DEVIATION: ClassVar = (0.5, 0.5, 0.5)
    TEXT_FIRST: ClassVar = True

    def __init__(self, preprocessor: Mapping[str, Any], vision: GridTower, images: ImageProcessor) -> None:
        super().__init__(preprocessor, vision, images)
        if self._fields.get("num_frames") is not None:
            refuse("num_frames", self._fields["num_frames"], "absent, for fps says how many", VIDEO_FILE)
        self._least, self._most = self._count("min_frames", 4), self._count("max_frames", 768)
        self._capped = self._fields.get("cap_pixels_per_frame", False)
        if not isinstance(self._capped, bool):
            refuse("cap_pixels_per_frame", self._capped, "true, false", VIDEO_FILE)
        self._frame_tokens = self._count("max_video_tokens", 768)

    def _sampled(self, clip: Clip, most: int) -> list[int]:
        wanted = int(clip.frames / clip.fps * self._fps)
        count = min(max(wanted, self._least), self._most, clip.frames, most)
        return [int(i) for i in np.linspace(0, clip.frames - 1, count).round()]

    def _times(self, indices: Sequence[int], fps: float) -> Iterator[str]:
        """The middle between the first and the last frame of a slice."""
        for start in range(0, len(indices), self._copies):
            first, last = indices[start] / fps, indices[start + self._copies - 1] / fps
            yield f"<{(first + last) / 2:.1f} seconds>"

    def _longest_of(self, frames: int) -> int:
        if not self._capped:
            return self._longest
        most = min(self._frame_tokens * self._block**2, self._longest // frames)
        return max(most, int(self._shortest * 1.05)) * frames
