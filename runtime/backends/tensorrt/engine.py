"""The engine protocol on a GPU: plans of TensorRT or TensorRT-RTX, run through the CUDA driver."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import Device
from moevlm.runtime.backends.tensorrt.decoder import Decoder, Slot
from moevlm.runtime.backends.tensorrt.kernel_cache import KernelCache, cache_file
from moevlm.runtime.backends.tensorrt.library import Library
from moevlm.runtime.backends.tensorrt.plan import Execution, Plan
from moevlm.runtime.bundle.verified_file import MappedFile
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.gpus import sms_text
from moevlm.runtime.core.manifest import ModelMetadata, TensorRTMetadata
from moevlm.runtime.core.states import StateSpec
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Step, VisionInputs, VisualFeatures, check_step, check_vision


@dataclass(frozen=True)
class PlanFile:
    """A plan of a bundle, read into memory. sha256: of data, and the manifest's."""

    name: str
    data: bytes
    sha256: str


@dataclass(frozen=True, weakref_slot=True, slots=True)
class TensorRTCache:
    """Keys and values of `batch` sequences on the device, which an engine takes back when nothing refers to this."""

    batch: int
    capacity: int
    slot: Slot


class TensorRTEngine:
    """Runs on the first GPU that the process may use. Threads may share it: their steps run one after the other.

    A context manager. Without `close`, everything is freed when nothing refers to it or the process ends.
    """

    def __init__(
        self,
        vision: PlanFile,
        decoder: PlanFile,
        experts: MappedFile | None,
        model: ModelMetadata,
        states: tuple[StateSpec, ...],
        metadata: TensorRTMetadata,
    ) -> None:
        """experts: a file whose hash was checked; None if the plan has all weights.

        Raises EngineError if there is no GPU, no TensorRT of that version, or a plan is not what the metadata say.
        """
        self._model, self._states, self._metadata = model, states, metadata
        self._lock = threading.RLock()
        self._device = Device()  # before anything of TensorRT: without a device some of its libraries crash
        resources = ExitStack()
        self._finalizer = weakref.finalize(self, _close, self._device, resources)
        try:
            with self._device:
                self._open(resources, vision, decoder, experts)
        except BaseException:
            self._finalizer()
            raise

    def _open(self, resources: ExitStack, vision: PlanFile, decoder: PlanFile, experts: MappedFile | None) -> None:
        metadata, gpu = self._metadata, self._device.gpu
        if gpu.sm not in metadata.sms:
            raise EngineError(f"the engine needs {sms_text(metadata.sms, ' or ')}; {gpu.name} is sm{gpu.sm}")
        library = Library(metadata)
        resources.callback(library.close)
        path = None
        if library.is_rtx:
            path = cache_file(decoder.sha256, vision.sha256, metadata.version, gpu.name, gpu.sm, gpu.driver)
        kernels = KernelCache(path)
        resources.callback(kernels.close)
        plans = []
        for file, profiles in ((decoder, 2), (vision, 1)):
            plan = Plan(library, self._device, file.name, file.data, profiles, kernels)
            resources.callback(plan.close)
            plans.append(plan)
        if size := max(plan.scratch_bytes for plan in plans):
            scratch = self._device.allocate(size)
            resources.callback(scratch.free)
            for plan in plans:
                plan.scratch = scratch
        self._decoder = Decoder(plans[0], experts, self._model, self._states, metadata)
        resources.callback(self._decoder.close)
        self._vision = _vision(plans[1])
        resources.callback(self._vision.close)

    @property
    def graphs(self) -> str:
        """Whether decoding replays recorded steps: "replayed", "refused: why" or "not yet"."""
        return self._decoder.graphs

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> VisualFeatures:
        """Visual tokens of all images, as many images in a call as the plan has room for.

        Raises EngineError for segment ids that are not in order, and for an image that is too large for the plan.
        A cancellation is heard between calls.
        """
        check_vision(inputs)
        cancellation = cancellation or Cancellation()
        outputs = []
        with self._lock:
            self._require_open()
            with self._device:
                for part in _parts(inputs.segment_id, self._metadata.max_patches):
                    cancellation.check()
                    outputs.append(self._vision.run({name: array[part] for name, array in vars(inputs).items()}))
        embeds = np.concatenate([output["visual_embeds"] for output in outputs])
        empty = np.zeros((0, *embeds.shape), np.float32)
        deepstack = [output["deepstack_embeds"] for output in outputs if "deepstack_embeds" in output]
        return VisualFeatures(embeds, np.concatenate(deepstack, axis=1) if deepstack else empty)

    def new_cache(self, batch: int, capacity: int) -> TensorRTCache:
        """An empty cache. Raises EngineError for more sequences or tokens than the engine was built for."""
        for name, value, most in (
            ("batch", batch, self._metadata.max_batch),
            ("capacity", capacity, self._metadata.capacity),
        ):
            if not 1 <= value <= most:
                raise EngineError(f"unsupported value {name} = {value} (the engine was built for 1 to {most})")
        with self._lock:
            self._require_open()
            with self._device:
                slot = self._decoder.take(batch)
        cache = TensorRTCache(batch, capacity, slot)
        weakref.finalize(cache, self._decoder.give_back, slot).atexit = False
        return cache

    def forward(
        self, step: Step, visual: VisualFeatures | None, cache: TensorRTCache, cancellation: Cancellation | None = None
    ) -> np.ndarray:
        """Logits [N, vocabulary] float32; see the protocol. Raises EngineError for more than it was built for.

        A cancellation is heard before the step starts, not while the GPU runs it.
        """
        check_step(step, visual, cache, self._model.vocabulary)
        length = step.input_ids.shape[1]
        if length > self._metadata.chunk_tokens:
            raise EngineError(
                f"a step of {length} tokens (the engine was built for up to {self._metadata.chunk_tokens})"
            )
        # Kernels read where they are told to: nothing on the device would notice.
        if int(step.cache_position.min()) < 0:
            raise EngineError(f"cache_position has {step.cache_position.min()} (allowed: 0 or more)")
        index = step.logits_index
        if not len(index) or not 0 <= int(index.min()) <= int(index.max()) < step.input_ids.size:
            raise EngineError(f"logits_index = {index} (allowed: one or more of 0 to {step.input_ids.size - 1})")
        with self._lock:
            if cancellation is not None:
                cancellation.check()  # others may have held the lock for long
            self._require_open()
            with self._device:
                return self._decoder.step(step, visual, cache.slot)

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise EngineError("this engine was closed")

    def close(self) -> None:
        """Free everything on the device; caches cannot be used any more. Once more does nothing."""
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


def _vision(plan: Plan) -> Execution:
    """Raises EngineError unless the plan has the inputs and outputs of a vision tower."""
    for names, given in (
        (set(VisionInputs.__dataclass_fields__), set(plan.inputs)),
        ({"visual_embeds"}, set(plan.outputs) - {"deepstack_embeds"}),
    ):
        if names != given:
            raise EngineError(f"{plan.name} has {', '.join(sorted(given))} (expected: {', '.join(sorted(names))})")
    return plan.execution(0)


def _parts(segment_id: np.ndarray, most: int) -> Iterator[slice]:
    """Whole images, as many at a time as have `most` patches together."""
    ends = [*(np.flatnonzero(np.diff(segment_id)) + 1), len(segment_id)]
    start = done = 0
    for end in map(int, ends):
        if end - done > most:
            raise EngineError(
                f"an image has {end - done} patches (the engine was built for up to {most}): make it smaller"
            )
        if end - start > most:
            yield slice(start, done)
            start = done
        done = end
    yield slice(start, done)
