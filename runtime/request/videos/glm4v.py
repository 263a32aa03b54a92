"""The video processor of GLM-4V: a frame each half second, and the whole second behind each slice.

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
        chosen = list(dict.fromkeys(found))
        if len(chosen) > most:
            chosen = [chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, most).round()]
        return chosen + chosen[-1:] * (len(chosen) % 2)

    def _times(self, indices: Sequence[int], fps: float) -> Iterator[str]:
        """Of every other frame, as the reference counts them whatever the temporal patch size; the last one goes on."""
        times = [index / fps for index in indices][::2]
        for number in range(len(indices) // self._copies):
            yield str(int(times[min(number, len(times) - 1)]))
