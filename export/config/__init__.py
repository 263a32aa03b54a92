"""The canonical description of a MoE VLM: what every family's config.json is translated into."""

from moevlm.export.config.feed_forward import MLPConfig, MoEConfig
from moevlm.export.config.mixers import GatedDeltaConfig, GQAConfig, MixerConfig, MLAConfig
from moevlm.export.config.model import DecoderConfig, LayerConfig, ModelConfig
from moevlm.export.config.vision import (
    GridVisionConfig,
    MergerConfig,
    MoonVisionConfig,
    PooledVisionConfig,
    ProjectorConfig,
    QueryVisionConfig,
    ResampledVisionConfig,
    RotaryVisionConfig,
    TileVisionConfig,
    VisionConfig,
)

__all__ = [
    "DecoderConfig",
    "GQAConfig",
    "GatedDeltaConfig",
    "GridVisionConfig",
    "LayerConfig",
    "MLAConfig",
    "MLPConfig",
    "MergerConfig",
    "MixerConfig",
    "MoEConfig",
    "ModelConfig",
    "MoonVisionConfig",
    "PooledVisionConfig",
    "ProjectorConfig",
    "QueryVisionConfig",
    "ResampledVisionConfig",
    "RotaryVisionConfig",
    "TileVisionConfig",
    "VisionConfig",
]
