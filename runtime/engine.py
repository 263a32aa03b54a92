"""What an engine is: encode images, hold a KV cache, run the decoder over a piece of sequence."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


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
    """One loaded target of a bundle."""

    def encode(self, inputs: VisionInputs) -> VisualFeatures: ...

    def new_cache(self, batch: int, capacity: int) -> Cache: ...

    def forward(self, step: Step, visual: VisualFeatures | None, cache: Any) -> np.ndarray:
        """Logits [N, vocabulary] float32. cache: one that this engine made. Raises EngineError if it is too small."""
        ...
