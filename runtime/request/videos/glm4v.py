"""The video processors of GLM-4V: a frame each half second or by the length of the clip, the time behind each slice.

Numerically those of Hugging Face transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.request.images.fields import CLIP_DEVIATION, CLIP_MEAN, grid_sizes
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.videos.clip import Clip
from moevlm.runtime.request.videos.processor import VideoProcessor

# Slices a second of clips of up to so many seconds; the last is for longer ones, too.
_RATES = ((30, 3.0), (300, 1.0), (2400, 0.5))
_MOST_FRAMES = 640


class Glm4vVideos(VideoProcessor):
    """Glm4vVideoProcessor."""

    KNOWN: ClassVar = {"max_duration"}
    EDGES: ClassVar = (112 * 112, 28 * 28 * 2 * 30000)
    SIZES: ClassVar = grid_sizes(14)
    MEAN: ClassVar = CLIP_MEAN
    DEVIATION: ClassVar = CLIP_DEVIATION
    TEXT_FIRST: ClassVar = False

    def __init__(self, preprocessor: Mapping[str, Any], vision: GridTower, images: ImageProcessor) -> None:
        super().__init__(preprocessor, vision, images)
        self._max_seconds = self._number("max_duration", 300)

    def _sampled(self, clip: Clip, most: int) -> list[int]:
        last, seconds = clip.frames - 1, _seconds(clip)
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
        last, seconds = clip.frames - 1, _seconds(clip)
        rate = next((rate for length, rate in _RATES if seconds <= length), _RATES[-1][1])
        count = min(int(min(seconds, _RATES[-1][0]) * rate * self._copies), _MOST_FRAMES)
        found: list[int] = []
        if clip.frames >= count:
            found = _spaced(clip, 1 / (self._copies * rate), int(seconds))
            if len(found) < count:
                first, end = (found[0], found[-1]) if found else (0, last)
                found = [int(i) for i in np.linspace(first, end, count, dtype=int)]
        if clip.frames < count or len(found) > count:
            found = [int(i) for i in np.linspace(0, last, count, dtype=int)]
        return _even(found, most)

    def _said(self, seconds: float) -> str:
        return f"{seconds:.1f} seconds"


def _seconds(clip: Clip) -> float:
    """How long a clip is: as it says, or else by the time of its last frame, as the reference counts it."""
    return clip.seconds or round((clip.frames - 1) / clip.fps) + 1


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
