"""The engine protocol on a GPU: engines of TensorRT or TensorRT-RTX, run through the CUDA driver."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import Device
from moevlm.runtime.backends.tensorrt.decoder import Decoder
from moevlm.runtime.backends.tensorrt.device_engine import DeviceEngine
from moevlm.runtime.backends.tensorrt.device_features import DeviceFeatures, FeatureLayout, FeatureMemory
from moevlm.runtime.backends.tensorrt.kernel_cache import KernelCache, cache_file
from moevlm.runtime.backends.tensorrt.library import Library
from moevlm.runtime.backends.tensorrt.limits import limits_of
from moevlm.runtime.backends.tensorrt.memory_budget import cache_memory
from moevlm.runtime.backends.tensorrt.vision import VisionTower
from moevlm.runtime.bundle.verified_file import MappedFile
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.gpus import sms_text
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.progress import Progress, silent
from moevlm.runtime.core.states import row_bytes
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import TEXT_ALONE, check_reserve, check_step, check_vision
from moevlm.runtime.engine.step import Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows
from moevlm.runtime.request.vision_inputs import VisionInputs


@dataclass(frozen=True)
class EngineFile:
    """A serialized engine of a bundle, read into memory. sha256: of data, and the manifest's."""

    name: str
    data: bytes
    sha256: str


@dataclass(frozen=True)
class EngineFiles:
    """What an engine is loaded from, all hashes checked. vision: None for a model of text alone.

    experts: None if the decoder has all weights.
    host_layers: how many sparse layers' experts stay in the host's memory.
    """

    vision: EngineFile | None
    decoder: EngineFile
    experts: MappedFile | None
    host_layers: int = 0


class TensorRTEngine:
    """Runs on the first GPU that the process may use. Threads may share it: their steps run one after the other.

    A context manager. Without `close`, everything is freed when nothing refers to it or the process ends.
    """

    def __init__(
        self, files: EngineFiles, model: ModelMetadata, metadata: EngineMetadata, progress: Progress = silent
    ) -> None:
        """progress: see `Decoder.warm_up`.

        Raises EngineError if there is no GPU, no TensorRT of that version, too little memory, or a file is not what the
        metadata say.
        """
        assert metadata.tensorrt is not None
        self._model, self._metadata = model, metadata.tensorrt
        self.states, self.limits = metadata.states, limits_of(model, metadata, metadata.tensorrt)
        self._pages = self._rows = self._steps = 0
        self._lock = threading.RLock()
        self._device = Device()  # before anything of TensorRT: without a device some of its libraries crash
        resources = ExitStack()
        self._finalizer = weakref.finalize(self, _close, self._device, resources)
        try:
            with self._device:
                self._open(resources, files, progress)
        except BaseException:
            self._finalizer()
            raise

    def _open(self, resources: ExitStack, files: EngineFiles, progress: Progress) -> None:
        metadata, model, gpu = self._metadata, self._model, self._device.gpu
        if gpu.sm not in metadata.sms:
            raise EngineError(f"the engine needs {sms_text(metadata.sms, ' or ')}; {gpu.name} is sm{gpu.sm}")
        library = Library(metadata)
        resources.callback(library.close)
        path = None
        if library.is_rtx:
            hashes = (files.decoder.sha256, *(() if files.vision is None else (files.vision.sha256,)))
            path = cache_file(*hashes, metadata.version, gpu.name, gpu.sm, gpu.driver)
        kernels = KernelCache(path)
        resources.callback(kernels.close)
        engines = []
        for file, profiles in ((files.decoder, 2), *(() if files.vision is None else ((files.vision, 1),))):
            engine = DeviceEngine(library, self._device, file.name, file.data, profiles, kernels)
            resources.callback(engine.close)
            engines.append(engine)
        if size := max(engine.scratch_bytes for engine in engines):
            scratch = self._device.allocate(size)
            resources.callback(scratch.free)
            for engine in engines:
                engine.scratch = scratch
        layout = FeatureLayout(model.hidden, model.deepstack, metadata.activations)
        features = FeatureMemory(self._device, layout, self._lock)
        resources.callback(features.close)
        self._decoder = Decoder(
            engines[0], files.experts, model, self.states, metadata, self.limits, features, files.host_layers
        )
        resources.callback(self._decoder.close)
        self._vision: VisionTower | None = None
        if files.vision is not None:
            self._vision = VisionTower(engines[1], model.tower, features, metadata.max_patches)
            resources.callback(self._vision.close)
        self._decoder.warm_up(progress)
        kernels.save()
        page, images = self.limits.page_size, None if self._vision is None else self._vision.call_bytes
        memory = cache_memory(self._device, self.states, page, metadata, images)
        self.limits = replace(self.limits, cache_memory=memory)

    @property
    def graphs(self) -> str:
        """Whether decode steps are replayed: "replayed", "refused: why" or "not yet"."""
        return self._decoder.graphs

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> DeviceFeatures:
        """Visual tokens of all images, as many images in a call as the engine has room for.

        Raises EngineError for an image_start that does not rise, and for an image that is too large for the engine.
        A cancellation is heard between calls.
        """
        check_vision(inputs)
        with self._lock:
            self._require_open()
            if self._vision is None:
                raise EngineError(TEXT_ALONE)
            with self._device:
                return self._vision.encode(inputs, cancellation or Cancellation())

    def reserve(self, pages: int, rows: int) -> None:
        """See the protocol. The memory is taken at once."""
        check_reserve(self.states, pages, rows)
        rows = rows if row_bytes(self.states) else 0
        for name, count, most in (("pages", pages, self._metadata.max_pages), ("rows", rows, self._metadata.max_rows)):
            if count > most:
                raise EngineError(f"unsupported value {name} = {count} (allowed: up to {most})")
        with self._lock:
            self._require_open()
            self._pages = 0
            self._steps += 1
            with self._device:
                self._decoder.reserve(pages, rows)
            self._pages, self._rows = pages, rows

    def forward(
        self, step: Step, visual: Sequence[FeatureRows] = (), cancellation: Cancellation | None = None
    ) -> StepOutput:
        """See the protocol. A cancellation is heard before the step starts, not while the GPU runs it."""
        with self._lock:
            if cancellation is not None:
                cancellation.check()  # others may have held the lock for long
            self._require_open()
            if not self._pages:
                raise EngineError("a step before any page was reserved")
            # Kernels read where they are told to: nothing on the device would notice.
            check_step(step, visual, self.limits, self._model, self._pages, self._rows)
            self._steps += 1
            with self._device:
                candidates = self._decoder.step(step, visual)
            return StepOutput(candidates, partial(self._logits, self._steps, len(step.logits_index)))

    def _logits(self, step: int, rows: int, row: int) -> np.ndarray:
        """A row of logits, which stays on the device until somebody asks for it, or another step runs."""
        if not 0 <= row < rows:
            raise EngineError(f"row {row} of logits (allowed: 0 to {rows - 1})")
        with self._lock:
            self._require_open()
            if step != self._steps:
                raise EngineError("logits of an earlier step: another one ran since")
            with self._device:
                return self._decoder.logits(row)

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise EngineError("this engine was closed")

    def close(self) -> None:
        """Free everything on the device; the pool cannot be used any more. Once more does nothing."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(device: Device, resources: ExitStack) -> None:
    with ExitStack() as stack:
        stack.callback(device.close)
        stack.enter_context(device)
        stack.callback(resources.close)
        device.synchronize()
