"""Visual features of images: encoded in calls of bounded size, and kept by what the images show."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moevlm.runtime.core.errors import EngineError, RequestError
from moevlm.runtime.core.towers import VisionMetadata
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.visual import VisualFeatures
from moevlm.runtime.request.prompt import SMALLER_IMAGES, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from moevlm.runtime.request.images.processor import ImageProcessor
    from moevlm.runtime.request.images.slices import Slice

# Images are encoded together up to so many patches: enough for full speed, few enough for a bounded memory and for a
# cancellation to be heard between two calls.
ENCODED_PATCHES = 4096


class ImageEncoder:
    """An engine's vision tower behind the bundle's preprocessing."""

    def __init__(self, engine: Engine, processor: ImageProcessor, vision: VisionMetadata) -> None:
        self._engine, self._processor, self._vision = engine, processor, vision

    def tokens(self, image: Image | Slice) -> int:
        """How many rows of features a resized image, or a slice of a video, has."""
        return self._vision.tokens(self._processor.grid(image))

    def check(self, prompt: Prompt) -> None:
        """Raises RequestError for an image that the engine cannot take."""
        most = self._engine.limits.max_patches
        for image, source in zip(prompt.images, prompt.sources, strict=True):
            patches = math.prod(self._processor.grid(image))
            if most is not None and patches > most:
                smaller = f" ({SMALLER_IMAGES}: at most {self._vision.rows(most, 1)} here)"
                raise RequestError(
                    f"{source} needs {patches} patches at once, the engine was built for up to {most}"
                    f"{'' if self._vision.queries else smaller}"
                )

    def encode(self, images: Sequence[Image | Slice], cancellation: Cancellation) -> Iterator[VisualFeatures]:
        """Features of each of the images, call by call. Raises Cancelled."""
        for group in self._groups(images):
            cancellation.check()
            inputs, _ = self._processor.pack(group)
            features = self._engine.encode(inputs, cancellation)
            rows = [self.tokens(image) for image in group]
            if sum(rows) != features.rows:
                raise EngineError(f"{features.rows} visual features for {sum(rows)} image tokens")
            yield from features.split(rows)

    def _groups(self, images: Sequence[Image | Slice]) -> Iterator[list[Image | Slice]]:
        """Consecutive images that are encoded in one call."""
        most = self._engine.limits.max_patches or ENCODED_PATCHES
        group: list[Image | Slice] = []
        patches = 0
        for image in images:
            size = math.prod(self._processor.grid(image))
            if group and patches + size > most:
                yield group
                group, patches = [], 0
            group.append(image)
            patches += size
        yield group


class FeatureCache:
    """Features by the hash of the image that they show, the longest unused of them dropped first."""

    def __init__(self, limit: int) -> None:
        """limit: bytes; 0 keeps none."""
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[bytes, VisualFeatures] = OrderedDict()

    @property
    def kept_bytes(self) -> int:
        """The size of what is kept now."""
        return self._bytes

    def forget(self) -> None:
        """Drop all."""
        self._kept.clear()
        self._bytes = 0

    def get(self, digest: bytes) -> VisualFeatures | None:
        found = self._kept.get(digest)
        if found is not None:
            self._kept.move_to_end(digest)
        return found

    def put(self, digest: bytes, features: VisualFeatures) -> None:
        """Keep features of one image."""
        size = features.nbytes
        if digest in self._kept or size > self._limit:
            return
        self._kept[digest] = features
        self._bytes += size
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
