"""The engine protocol on a GPU: plans of TensorRT or TensorRT-RTX, run through the CUDA driver."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import Device
from moevlm.runtime.backends.tensorrt.decoder import Decoder
from moevlm.runtime.backends.tensorrt.kernel_cache import KernelCache, cache_file
from moevlm.runtime.backends.tensorrt.library import Library
from moevlm.runtime.backends.tensorrt.limits import limits_of
from moevlm.runtime.backends.tensorrt.plan import Execution, Plan
from moevlm.runtime.bundle.verified_file import MappedFile
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.gpus import sms_text
from moevlm.runtime.core.manifest import EngineMetadata, ModelMetadata
from moevlm.runtime.core.names import CANDIDATES
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.candidates import candidates_of
from moevlm.runtime.engine.protocol import check_reserve, check_step, check_vision
from moevlm.runtime.engine.step import Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, joined
from moevlm.runtime.request.vision_inputs import VisionInputs


@dataclass(frozen=True)
class PlanFile:
    """A plan of a bundle, read into memory. sha256: of data, and the manifest's."""

    name: str
    data: bytes
    sha256: str


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
        metadata: EngineMetadata,
        host_layers: int = 0,
    ) -> None:
        """experts: a file whose hash was checked; None if the plan has all weights.

        host_layers: how many sparse layers' experts stay in the host's memory.

        Raises EngineError if there is no GPU, no TensorRT of that version, or a plan is not what the metadata say.
        """
        assert metadata.tensorrt is not None
        self._model, self._metadata, self._pages = model, metadata.tensorrt, 0
        self.states, self.limits = metadata.states, limits_of(model, metadata.tensorrt)
        self._lock = threading.RLock()
        self._device = Device()  # before anything of TensorRT: without a device some of its libraries crash
        resources = ExitStack()
        self._finalizer = weakref.finalize(self, _close, self._device, resources)
        try:
            with self._device:
                self._open(resources, vision, decoder, experts, host_layers)
        except BaseException:
            self._finalizer()
            raise

    def _open(
        self,
        resources: ExitStack,
        vision: PlanFile,
        decoder: PlanFile,
        experts: MappedFile | None,
        host_layers: int,
    ) -> None:
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
        self._decoder = Decoder(plans[0], experts, self._model, self.states, metadata, host_layers)
        resources.callback(self._decoder.close)
        self._vision = _vision(plans[1])
        resources.callback(self._vision.close)

    @property
    def graphs(self) -> str:
        """Whether decoding replays recorded steps: "replayed", "refused: why" or "not yet"."""
        return self._decoder.graphs

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> HostFeatures:
        """Visual tokens of all images, as many images in a call as the plan has room for.

        Raises EngineError for an image_start that does not rise, and for an image that is too large for the plan.
        A cancellation is heard between calls.
        """
        check_vision(inputs)
        cancellation = cancellation or Cancellation()
        outputs = []
        with self._lock:
            self._require_open()
            with self._device:
                for part in _parts(inputs, self._metadata.max_patches):
                    cancellation.check()
                    outputs.append(self._vision.run(vars(part)))
        embeds = np.concatenate([output["visual_embeds"] for output in outputs])
        empty = np.zeros((0, *embeds.shape), np.float32)
        deepstack = [output["deepstack_embeds"] for output in outputs if "deepstack_embeds" in output]
        return HostFeatures(embeds, np.concatenate(deepstack, axis=1) if deepstack else empty)

    def reserve(self, pages: int, rows: int) -> None:
        """See the protocol. A page is a slot of the built capacity, allocated when a step first has it."""
        check_reserve(self.states, pages, rows)
        with self._lock:
            self._require_open()
            self._pages = pages
            with self._device:
                self._decoder.free_slots()

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
            check_step(step, visual, self.limits, self._model.vocabulary, self._pages, 0)
            if step.copies:
                raise EngineError(f"copies = {step.copies} (allowed: none, a sequence has a page of its own)")
            with self._device:
                logits = self._decoder.step(step, joined(visual) if visual else None)
        return StepOutput(candidates_of(logits, CANDIDATES), lambda row: logits[row].copy())

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


def _vision(plan: Plan) -> Execution:
    """Raises EngineError unless the plan has the inputs and outputs of a vision tower."""
    for names, given in (
        (set(VisionInputs.__dataclass_fields__), set(plan.inputs)),
        ({"visual_embeds"}, set(plan.outputs) - {"deepstack_embeds"}),
    ):
        if names != given:
            raise EngineError(f"{plan.name} has {', '.join(sorted(given))} (expected: {', '.join(sorted(names))})")
    return plan.execution(0)


def _parts(inputs: VisionInputs, most: int) -> Iterator[VisionInputs]:
    """Whole images, as many at a time as have `most` patches together."""
    starts = inputs.image_start.tolist()
    first = 0  # image of the part
    for image, end in enumerate(starts[1:]):
        if end - starts[image] > most:
            raise EngineError(
                f"an image has {end - starts[image]} patches (the engine was built for up to {most}): make it smaller"
            )
        if end - starts[first] > most:
            yield _part(inputs, first, image)
            first = image
    yield _part(inputs, first, len(starts) - 1)


def _part(inputs: VisionInputs, first: int, stop: int) -> VisionInputs:
    """Images first to stop, alone."""
    starts = inputs.image_start[first : stop + 1]
    patches = slice(starts[0], starts[-1])
    arrays = {name: array[patches] for name, array in vars(inputs).items() if name != "image_start"}
    return VisionInputs(**arrays, image_start=starts - starts[0])
