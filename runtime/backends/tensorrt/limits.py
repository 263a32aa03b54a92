"""What a step of a TensorRT engine may hold."""

from __future__ import annotations

from moevlm.runtime.core.engine_metadata import EngineMetadata, TensorRTMetadata
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.step import EngineLimits


def limits_of(model: ModelMetadata, engine: EngineMetadata, built: TensorRTMetadata) -> EngineLimits:
    """The limits of an engine of a model. built: what it was built for."""
    return EngineLimits(
        max_sequences=built.max_sequences,
        max_tokens=built.max_tokens,
        max_logits=built.max_logits,
        max_context=min(model.context, (built.max_pages - 1) * engine.page_size),
        page_size=engine.page_size,
        max_visual=min(built.max_visual, built.max_tokens),  # a token stands for a row at most
        max_patches=built.max_patches,
        packed=True,
        max_pages=built.max_pages,
        chunk_tokens=max(built.max_tokens - built.max_sequences, 1),  # beside a decode of every other sequence
    )
