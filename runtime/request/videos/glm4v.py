"""The video processors of GLM-4V: a frame each half second or by the length of the clip, the time behind each slice.

Numerically that of Hugging Face transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.videos.clip import Clip
from moevlm.runtime.request.videos.processor import VideoProcessor

_RATES = (
    (30, 3.0),
    (300, 1.0),
    (2400, 0.5),
)  # slices a second of clips up to so many seconds, the last for longer ones
_MOST_FRAMES = 640


class Glm4vVideos(VideoProcessor):
    """Glm4vVideoProcessor."""

    KNOWN: ClassVar = {"max_duration"}
    EDGES: ClassVar = (112 * 112, 28 * 28 * 2 * 30000)
    SIZES: ClassVar = {
        "patch_size": (14, "patch_size"),
        "merge_size": (2, "merge_size"),
        "temporal_patch_size": (2, "temporal_patch_size"),
    }
    MEAN: ClassVar = (0.48145466, 0.4578275, 0.40821073)
    DEVIATION: ClassVar = (0.26862954, 0.26130258, 0.27577711)
    TEXT_FIRST: ClassVar = False

    def __init__(self, preprocessor: Mapping[str, Any], vision: GridTower, images: ImageProcessor) -> None:
        super().__init__(preprocessor, vision, images)
        self._max_seconds = self._number("max_duration", 300)

    def _sampled(self, clip: Clip, most: int) -> list[int]:
        last = clip.frames - 1
        seconds = clip.seconds or round(last / clip.fps) + 1
        if seconds <= self._max_seconds:
            count = max(math.floor(seconds * self._fps), 1)
            found = [min(last, math.ceil(i * clip.fps / self._fps)) for i in range(count)]
        elif (count := int(self._max_seconds * self._fps)) >= clip.frames:
            found = list(range(clip.frames))
        else:
            found = [min(last, math.ceil(t * clip.fps)) for t in np.linspace(0, seconds, count)]
        return _even(found, most)

    def _times(self, indices: Sequence[int], fps: float) -> Iterator[str]:
        """Of every other frame, as the reference counts them whatever the temporal patch size; the last one goes on."""
        times = [index / fps for index in indices][::2]
        for number in range(len(indices) // self._copies):
            yield self._said(times[min(number, len(times) - 1)])

    def _said(self, seconds: float) -> str:
        return str(int(seconds))


class Glm46VVideos(Glm4vVideos):
    """Glm46VVideoProcessor: the longer a clip, the fewer frames a second."""

    def _sampled(self, clip: Clip, most: int) -> list[int]:
        last, seconds = clip.frames - 1, clip.seconds or round((clip.frames - 1) / clip.fps) + 1
        rate = next((rate for length, rate in _RATES if seconds <= length), _RATES[-1][1])
        count = min(int(min(seconds, _RATES[-1][0]) * rate * self._copies), _MOST_FRAMES)
        found: list[int] = []
        if clip.frames >= count:
            found = _spaced(clip, 1 / (self._copies * rate), int(seconds))
            if len(found) < count:
                first, last = (found[0], found[-1]) if found else (0, last)
                found = [int(i) for i in np.linspace(first, last, count, dtype=int)]
        if clip.frames < count or len(found) > count:
            found = [int(i) for i in np.linspace(0, clip.frames - 1, count, dtype=int)]
        return _even(found, most)

    def _said(self, seconds: float) -> str:
        return f"{seconds:.1f} seconds"


def _spaced(clip: Clip, gap: float, end: int) -> list[int]:
    """Frames that lie `gap` seconds apart, up to `end` seconds: sums of float64, as the reference makes them."""
    found, now, step = [], 0.0, 1 / clip.fps
    for index in range(clip.frames):
        if index * step >= now:
            now += gap
            found.append(index)
            if now >= end:
                break
    return found


def _even(found: Sequence[int], most: int) -> list[int]:
    """Each frame once, at most `most` of them, the last one again if their number is odd."""
    chosen = list(dict.fromkeys(found))
    if len(chosen) > most:
        chosen = [chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, most).round()]
    return chosen + chosen[-1:] * (len(chosen) % 2)
