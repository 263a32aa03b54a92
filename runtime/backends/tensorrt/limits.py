"""What a step of a TensorRT engine may hold."""

from __future__ import annotations

from moevlm.runtime.core.manifest import ModelMetadata, TensorRTMetadata
from moevlm.runtime.engine.step import EngineLimits


def limits_of(model: ModelMetadata, built: TensorRTMetadata) -> EngineLimits:
    """The limits of an engine of a model. built: what it was built for."""
    context = min(model.context, built.capacity)
    # Every token of a step may be of an image.
    tokens = min(built.chunk_tokens, built.max_visual, context)
    return EngineLimits(1, tokens, tokens, context, built.capacity, built.max_visual, built.max_patches, copies=False)
