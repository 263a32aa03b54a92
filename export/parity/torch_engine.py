"""Canonical PyTorch as an engine, with one layer in memory at a time.

What parity asks an engine does not depend on what it answers. So it is asked twice: first the steps are noted; then
each layer takes all of them before the next one is read; then the same calls get their answers.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from moevlm.export.config import DecoderConfig
from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel, load
from moevlm.export.modules.decoder import Decoder, Layer, visual_rows
from moevlm.export.modules.ops import recorded_taps
from moevlm.export.modules.streaming import parts_of, release, set_tensor, stream
from moevlm.export.modules.vision import Vision
from moevlm.export.parity.taps import Tapped
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Step, VisionInputs, VisualFeatures

Progress = Callable[[int, int], None]


@dataclass
class NotedStep:
    """A step and what became of it. x: the residual stream, [B * S, H]. taps: by name, rows [B * S, ...], if asked."""

    step: Step
    visual: VisualFeatures
    x: torch.Tensor
    tapped: bool = False
    taps: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class NotedCache:
    """The steps into one cache, in order."""

    batch: int
    capacity: int
    steps: list[NotedStep] = field(default_factory=list)


class StepNotes:
    """The first time: an engine that encodes images, and answers steps with logits of no vocabulary."""

    kernel_routes = False

    def __init__(self, config: DecoderConfig, images: "Images") -> None:
        self._config, self._images = config, images
        self.caches: list[NotedCache] = []
        self._last: NotedStep | None = None

    @property
    def taps(self) -> Mapping[str, np.ndarray]:
        """Empty; who reads them will have those of the last step."""
        if self._last is not None:
            self._last.tapped = True
        return defaultdict(lambda: np.zeros((0, 0)))

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> VisualFeatures:  # noqa: ARG002
        return self._images.encode(inputs)

    def new_cache(self, batch: int, capacity: int) -> NotedCache:
        self.caches.append(NotedCache(batch, capacity))
        return self.caches[-1]

    def forward(
        self,
        step: Step,
        visual: VisualFeatures | None,
        cache: NotedCache,
        cancellation: Cancellation | None = None,  # noqa: ARG002
    ) -> np.ndarray:
        none = VisualFeatures(
            np.zeros((1, self._config.hidden), np.float32),
            np.zeros((self._config.deepstack, 1, self._config.hidden), np.float32),
        )
        self._last = NotedStep(step, visual or none, torch.empty(0))
        cache.steps.append(self._last)
        return np.zeros((len(step.logits_index), 0), np.float32)

    def close(self) -> None:
        """Nothing to do."""


class Images:
    """The vision tower, block by block. An input that it has seen is not computed again."""

    def __init__(self, vision: Vision, model: CanonicalModel) -> None:
        self._vision, self._seen = vision, list[tuple[VisionInputs, VisualFeatures]]()
        weights = model.vision_weights
        parts = parts_of(vision, (nn.ModuleList,))
        for name in vision.state_dict():
            if not name.startswith(tuple(f"{part}." for part in parts)):
                set_tensor(vision, name, torch.from_numpy(read(weights[name])))
        stream(parts, lambda name: load(parts[name], weights, f"{name}."))

    @torch.no_grad()
    def encode(self, inputs: VisionInputs) -> VisualFeatures:
        for known, features in self._seen:
            if _equal(known, inputs):
                return features
        embeds, deepstack = self._vision(**{name: torch.from_numpy(array) for name, array in vars(inputs).items()})
        empty = np.zeros((0, *embeds.shape), np.float32)
        features = VisualFeatures(embeds.numpy(), empty if deepstack is None else deepstack.numpy())
        self._seen.append((inputs, features))
        return features


class TorchEngine:
    """Canonical PyTorch, float32, for calls that are known.

    ask: makes all the calls that will come, in the same order, of the engine that it is given. Raises EngineError, as
    `forward`, for others. taps: of the last forward, where `ask` has read them behind it.
    """

    def __init__(
        self, model: CanonicalModel, ask: Callable[[Tapped], object], progress: Progress = lambda *_: None
    ) -> None:
        self.config = model.config
        self.taps: dict[str, np.ndarray] = {}
        self.kernel_routes = False
        vision, self._decoder = model.towers()
        self._images = Images(vision, model)
        notes = StepNotes(model.config.decoder, self._images)
        ask(notes)
        compute(self._decoder, model, notes.caches, progress)
        self._caches = iter(notes.caches)

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> VisualFeatures:  # noqa: ARG002
        return self._images.encode(inputs)

    def new_cache(self, batch: int, capacity: int) -> NotedCache:
        cache = next(self._caches, None)
        if cache is None or (cache.batch, cache.capacity) != (batch, capacity):
            raise EngineError(f"nobody announced a cache of {batch} sequences of {capacity} tokens")
        return cache

    @torch.no_grad()
    def forward(
        self,
        step: Step,
        visual: VisualFeatures | None,  # noqa: ARG002
        cache: NotedCache,
        cancellation: Cancellation | None = None,  # noqa: ARG002
    ) -> np.ndarray:
        if not cache.steps or not _equal(step, cache.steps[0].step):
            raise EngineError("nobody announced this step")
        noted = cache.steps.pop(0)
        self.taps = noted.taps
        return self._decoder.logits(noted.x, torch.from_numpy(step.logits_index)).numpy()

    def close(self) -> None:
        """Nothing to do."""


@torch.no_grad()
def compute(decoder: Decoder, model: CanonicalModel, caches: Sequence[NotedCache], progress: Progress) -> None:
    """Take all steps through all layers. Afterwards the last norm and the head stay in memory."""
    weights, layers = model.decoder_weights, len(decoder.layers)
    steps = [noted for cache in caches for noted in cache.steps]
    set_tensor(decoder, "embedding", torch.from_numpy(read(weights["embedding"])))
    for noted in steps:
        embeds, visual = torch.from_numpy(noted.visual.embeds), visual_rows(torch.from_numpy(noted.step.visual_index))
        noted.x = decoder.embed(torch.from_numpy(noted.step.input_ids), embeds, visual)
    if decoder.head is not None:
        set_tensor(decoder, "embedding", torch.empty_like(decoder.embedding, device="meta"))
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        load(layer, weights, f"layers.{i}.")
        with recorded_taps() as taps:
            _run_layer(decoder, i, layer, caches, steps)
        start = 0
        for noted in steps:
            rows = slice(start, start + len(noted.x))
            start = rows.stop
            if noted.tapped:
                noted.taps |= {name: values[rows].numpy().copy() for name, values in taps.items()}
                noted.taps[f"layers.{i}.hidden"] = noted.x.numpy()
        release(layer)
        progress(i + 1, layers)
    load(decoder.norm, weights, "norm.")
    if decoder.head is not None:
        set_tensor(decoder, "head", torch.from_numpy(read(weights["head"])))


def _run_layer(
    decoder: Decoder, i: int, layer: Layer, caches: Sequence[NotedCache], steps: Sequence[NotedStep]
) -> None:
    attention = decoder.config.attention
    for cache in caches:
        shape = (cache.batch, attention.kv_heads, cache.capacity, attention.head_dim)
        kept = torch.zeros(shape), torch.zeros(shape)
        for noted in cache.steps:
            step = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in vars(noted.step).items()}
            noted.x, kept = layer.attend(noted.x, step["rope_cos"], step["rope_sin"], kept, step["cache_position"])
    # Behind attention no token sees another, so each expert is used once for all of them.
    if not steps:
        return
    fed = layer.feed(torch.cat([noted.x for noted in steps])).split([len(noted.x) for noted in steps])
    for noted, x in zip(steps, fed, strict=True):
        deepstack = torch.from_numpy(noted.visual.deepstack) if decoder.config.deepstack else None
        visual = visual_rows(torch.from_numpy(noted.step.visual_index))
        noted.x = decoder.add_deepstack(i, x, deepstack, visual)


def _equal(first: object, second: object) -> bool:
    """Two dataclasses of arrays."""
    return all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
