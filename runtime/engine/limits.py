"""What a step of an engine may hold, from the manifest."""

from __future__ import annotations

from moevlm.runtime.core.manifest import EngineMetadata, ModelMetadata
from moevlm.runtime.engine.step import EngineLimits

_ANY = 1 << 20  # sequences, tokens or logits of a step, where the graph has no limit of its own


def limits_of(model: ModelMetadata, metadata: EngineMetadata) -> EngineLimits:
    """The limits of one engine of a model."""
    built = metadata.tensorrt
    if built is not None:
        context = min(model.context, built.capacity)
        # Every token of a step may be of an image.
        tokens = min(built.chunk_tokens, built.max_visual, context)
        return EngineLimits(1, tokens, tokens, context, built.capacity, built.max_visual, built.max_patches)
    if not metadata.page_size:
        return EngineLimits(1, model.context, model.context, model.context, model.context)
    return EngineLimits(_ANY, _ANY, _ANY, model.context, metadata.page_size, packed=metadata.row_independent)
