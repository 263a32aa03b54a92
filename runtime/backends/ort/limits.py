"""What a step of an engine on ONNX Runtime may hold."""

from __future__ import annotations

from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.step import EngineLimits

_ANY = 1 << 20  # tokens or logits of a step: the graph has no limit of its own
_SEQUENCES = 32  # nor has it one of these: more wait, so that each of them gets its tokens soon
# Prompt tokens beside decodes. Measured on two cores, such a step takes some 2 times as long as one of seven decodes
# alone; with 32 it takes 3.1 times as long.
_MIXED_TOKENS = 24


def limits_of(model: ModelMetadata, engine: EngineMetadata) -> EngineLimits:
    """The limits of one engine of a model."""
    if not engine.page_size:
        return EngineLimits(1, model.context, model.context, model.context, model.context)
    # Where rows depend on what else is in a step, an answer would depend on the load: such an engine is not packed.
    return EngineLimits(
        _SEQUENCES,
        _ANY,
        _ANY,
        model.context,
        engine.page_size,
        packed=engine.row_independent,
        mixed_tokens=_MIXED_TOKENS,
    )
