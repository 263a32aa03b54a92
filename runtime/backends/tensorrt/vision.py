"""The vision tower on the device: patches in, features that stay there out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moevlm.runtime.backends.tensorrt.device_engine import DeviceEngine
from moevlm.runtime.backends.tensorrt.device_features import DeviceFeatures, FeatureMemory
from moevlm.runtime.backends.tensorrt.execution import Execution
from moevlm.runtime.core.dtypes import DTYPES, TENSORRT
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.towers import VisionMetadata
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.request.vision_inputs import VisionInputs


class VisionTower:
    """Calls of a vision engine. Used by one thread at a time, inside the device's context."""

    def __init__(self, engine: DeviceEngine, tower: VisionMetadata, memory: FeatureMemory, max_patches: int) -> None:
        """max_patches: of a call. Raises EngineError if the engine is not what the manifest says."""
        self._memory, self._tower, self._most = memory, tower, max_patches
        deepstack = {"deepstack_embeds"} if tower.deepstack else set()
        for names, given in (
            ({*tower.inputs, "image_start"}, set(engine.inputs)),
            ({"visual_embeds", *deepstack}, set(engine.outputs)),
        ):
            if names != given:
                found, expected = (", ".join(sorted(some)) for some in (given, names))
                raise EngineError(f"{engine.name} has {found} (expected: {expected})")
        dtype = DTYPES[memory.layout.dtype].tensorrt
        for name in engine.outputs:
            if engine.dtypes[name] != dtype:
                raise EngineError(f"{engine.name} gives {name} as {engine.dtypes[name]}, manifest.json says {dtype}")
        most = {name: engine.most(name, 0) for name in engine.inputs}
        self._images = most["image_start"][0] - 1
        inputs = sum(math.prod(shape) * TENSORRT[engine.dtypes[name]].bits // 8 for name, shape in most.items())
        self._call_bytes = inputs + 2 * memory.layout.size(tower.rows(max_patches, self._images))
        self._execution = Execution(engine, 0)

    @property
    def call_bytes(self) -> int:
        """What the largest call takes of the device: its inputs, and its features twice while they are split."""
        return self._call_bytes

    def encode(self, inputs: VisionInputs, cancellation: Cancellation) -> DeviceFeatures:
        """Features of all images, as many images in a call as the engine has room for.

        Raises EngineError for an image that is too large, and Cancelled between calls.
        """
        parts = []
        for part in self._parts(inputs):
            cancellation.check()
            parts.append(self._call(part))
        return self._memory.joined(parts)

    def _call(self, inputs: VisionInputs) -> DeviceFeatures:
        arrays = inputs.arrays
        features = self._memory.allocate(self._tower.rows(inputs.patches, len(inputs.image_start) - 1))
        self._execution.bind("visual_embeds", *features.embeds)
        if self._memory.layout.levels:
            self._execution.bind("deepstack_embeds", *features.levels)
        self._execution.arrange({name: array.shape for name, array in arrays.items()})
        for name, array in arrays.items():
            self._execution.arrays[name][...] = array
        self._execution.run()
        return features

    def _parts(self, inputs: VisionInputs) -> Iterator[VisionInputs]:
        """Whole images, as many at a time as fit."""
        starts = inputs.image_start.tolist()
        first = 0  # image of the part
        for image, end in enumerate(starts[1:]):
            if end - starts[image] > self._most:
                raise EngineError(
                    f"an image has {end - starts[image]} patches (the engine was built for up to {self._most}): "
                    "make it smaller"
                )
            if end - starts[first] > self._most or image - first == self._images:
                yield inputs.part(first, image)
                first = image
        yield inputs.part(first, len(starts) - 1)

    def close(self) -> None:
        self._execution.close()
