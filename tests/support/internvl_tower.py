"""Tiny towers of InternVL with their projector, in transformers and here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from transformers import InternVLConfig, InternVLModel

from moevlm.export.families.fields import Fields
from moevlm.export.families.internvl_vision import INTERNVL_LEFT_OUT, INTERNVL_TOWER, internvl_tower
from moevlm.runtime.core.towers import TileTower
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.vision_towers import TinyTileTower, bound, filled, tiles_of

VISION: dict[str, Any] = {
    "model_type": "internvl_vision",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [16, 16],
    "patch_size": [4, 4],
}
OUT = 24
TEXT = {
    **{"model_type": "qwen2", "vocab_size": 8, "hidden_size": OUT, "intermediate_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}
# (of vision_config, of config.json)
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as the small ones": ({"attention_bias": True}, {}),
    "as the large ones": ({"norm_type": "rms_norm", "use_qk_norm": True, "num_attention_heads": 4}, {}),
    "last norm, mask token, quarters": (
        {"use_mean_pooling": False, "use_mask_token": True, "image_size": 32, "hidden_act": "silu"},
        {"downsample_ratio": 0.25, "projector_hidden_act": "silu"},
    ),
    "layer named from the front, whole patches": (
        {"use_mean_pooling": False, "num_hidden_layers": 3, "patch_size": 8, "layer_norm_eps": 1e-3},
        {"vision_feature_layer": 3, "downsample_ratio": 1.0, "projector_hidden_act": "gelu_pytorch_tanh"},
    ),
    "heads of 64": ({"hidden_size": 128, "intermediate_size": 64, "attention_bias": True}, {}),
}


@dataclass(frozen=True)
class TinyInternVLTower(TinyTileTower):
    """theirs: transformers' model."""

    theirs: InternVLModel
    metadata: TileTower

    CONFIGURATIONS: ClassVar = CONFIGURATIONS
    WIDE: ClassVar = "heads of 64"
    PLANNED: ClassVar = "as the large ones"
    OUT: ClassVar = OUT

    @classmethod
    def of(cls, name: str, seed: int = 0) -> Self:
        """One of CONFIGURATIONS with every parameter random."""
        vision, top = CONFIGURATIONS[name]
        values = VISION | vision
        config = InternVLConfig(vision_config=values, text_config=TEXT, **top)
        config.vision_config._attn_implementation = "eager"
        torch.manual_seed(seed)
        theirs = InternVLModel(config).eval()
        parts = {f"model.{name}.": getattr(theirs, name) for name in ("vision_tower", "multi_modal_projector")}
        on_disk = filled(parts, _values)
        ours = internvl_tower(Fields(values), Fields(top), OUT)
        module, weights = bound(ours, INTERNVL_TOWER, on_disk, INTERNVL_LEFT_OUT)
        return cls(module, weights, ours.metadata(), theirs)

    @torch.no_grad()
    def wanted(self, inputs: VisionInputs) -> np.ndarray:
        pixels = torch.from_numpy(tiles_of(inputs, self.metadata))
        return self.theirs.get_image_features(pixels).pooler_output.flatten(0, 1).numpy()


def _values(name: str, normal: torch.Tensor) -> torch.Tensor:
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.3 * normal
    if "lambda" in name:
        return 0.5 + 0.2 * normal
    if "embeddings.position" in name or "token" in name:
        return 0.5 * normal
    return 0.3 * normal if normal.dim() == 1 else normal * normal[0].numel() ** -0.5
