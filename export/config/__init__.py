"""The canonical description of a MoE VLM: what every family's config.json is translated into."""

from moevlm.export.config.mixers import GatedDeltaConfig, GQAConfig, MixerConfig
from moevlm.export.config.model import (
    DecoderConfig,
    LayerConfig,
    MergerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    VisionConfig,
)

__all__ = [
    "DecoderConfig",
    "GQAConfig",
    "GatedDeltaConfig",
    "LayerConfig",
    "MLPConfig",
    "MergerConfig",
    "MixerConfig",
    "MoEConfig",
    "ModelConfig",
    "VisionConfig",
]
