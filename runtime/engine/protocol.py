"""What an engine is: encode images, hold a KV cache, run the decoder over a piece of sequence."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.engine.cancellation import Cancellation


@dataclass(frozen=True)
class VisionInputs:
    """One packed call for any number of images; P patches in merge-block order, image after image.

    pixel_patches: [P, channels * temporal_patch * patch**2] float32, normalised.
    position_index, position_weight: [P, taps] int64, float32: rows of the position table and their weights.
    rope_cos, rope_sin: [P, head_dim / 2] float32.
    segment_id: [P] int64, never falling; patches that see each other have the same.
    """

    pixel_patches: np.ndarray
    position_index: np.ndarray
    position_weight: np.ndarray
    rope_cos: np.ndarray
    rope_sin: np.ndarray
    segment_id: np.ndarray


@dataclass(frozen=True)
class VisualFeatures:
    """embeds: [V, H] float32, V = P / merge**2; deepstack: [L, V, H] float32, L may be 0."""

    embeds: np.ndarray
    deepstack: np.ndarray


@dataclass(frozen=True)
class Step:
    """S tokens for each of B sequences.

    input_ids: [B, S] int64. visual_index: [B, S] int64, row of VisualFeatures.embeds or -1 for text.
    rope_cos, rope_sin: [B, S, R / 2] float32. cache_position: [B] int64, tokens already in the cache.
    logits_index: [N] int64, positions b * S + s whose logits are wanted.
    A row may be padded on the right: padding is overwritten by that row's next step and seen by no valid token.
    """

    input_ids: np.ndarray
    visual_index: np.ndarray
    rope_cos: np.ndarray
    rope_sin: np.ndarray
    cache_position: np.ndarray
    logits_index: np.ndarray


class Cache(Protocol):
    """Keys and values of B sequences, room for `capacity` tokens each, updated in place by `Engine.forward`."""

    @property
    def batch(self) -> int: ...
    @property
    def capacity(self) -> int: ...


class Engine(Protocol):
    """One loaded target of a bundle.

    cancellation: ends a call that runs by Cancelled, where the engine can be interrupted. The engine stays usable, the
    step's cache does not.
    """

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> VisualFeatures: ...

    def new_cache(self, batch: int, capacity: int) -> Cache: ...

    def forward(
        self, step: Step, visual: VisualFeatures | None, cache: Any, cancellation: Cancellation | None = None
    ) -> np.ndarray:
        """Logits [N, vocabulary] float32. cache: one that this engine made. Raises EngineError if it is too small."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used any more. Once more does nothing."""
        ...


def check_cache(batch: int, capacity: int) -> None:
    """Raises EngineError for a cache of no sequence or no token."""
    for name, value in (("batch", batch), ("capacity", capacity)):
        if value < 1:
            raise EngineError(f"unsupported value {name} = {value} (allowed: 1 or more)")


def check_vision(inputs: VisionInputs) -> None:
    """Raises EngineError for segment ids that are not in order."""
    if (np.diff(inputs.segment_id) < 0).any():
        raise EngineError("segment_id falls: the patches of one image must follow each other")


def check_step(step: Step, visual: VisualFeatures | None, cache: Cache, vocabulary: int) -> None:
    """Raises EngineError, naming the value, for a step that does not fit its cache, its features or the vocabulary."""
    if step.input_ids.ndim != 2 or step.input_ids.size == 0:
        raise EngineError(f"input_ids has the shape {list(step.input_ids.shape)} (allowed: [B, S], 1 or more of each)")
    batch, length = step.input_ids.shape
    if batch != cache.batch:
        raise EngineError(f"a step of {batch} sequences does not fit into a cache of {cache.batch}")
    if int(step.cache_position.max()) + length > cache.capacity:
        raise EngineError(
            f"{length} tokens at position {step.cache_position.max()} do not fit into a cache of {cache.capacity}"
        )
    rows = 0 if visual is None else len(visual.embeds)
    if int(step.visual_index.max()) >= rows:
        raise EngineError(f"visual_index = {step.visual_index.max()}, but the step has {rows} visual features")
    if not 0 <= int(step.input_ids.min()) <= int(step.input_ids.max()) < vocabulary:
        wrong = step.input_ids[(step.input_ids < 0) | (step.input_ids >= vocabulary)].flat[0]
        raise EngineError(f"input_ids has {wrong} (allowed: 0 to {vocabulary - 1})")
