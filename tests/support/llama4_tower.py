"""Tiny towers of Llama 4 with their projector, in transformers and here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from transformers import Llama4Config, Llama4VisionConfig, Llama4VisionModel
from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector

from moevlm.export.families.fields import Fields
from moevlm.export.families.llama4_vision import llama4_tower, llama4_tower_weights
from moevlm.runtime.core.towers import TileTower
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.vision_towers import TinyTileTower, bound, filled, tiles_of

VISION: dict[str, Any] = {
    "model_type": "llama4_vision_model",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projector_input_dim": 40,
    "projector_output_dim": 40,
    "vision_output_dim": 40,
    "rope_theta": 10_000.0,
}
OUT = 24
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "heads of 8, another base": {"num_attention_heads": 4, "rope_theta": 50.0},
    "three blocks, sides of 6 and 3": {"num_hidden_layers": 3, "image_size": 18, "patch_size": 3},
    "quarters": {"pixel_shuffle_ratio": 0.25, "intermediate_size": 512, "image_size": 32},
    "heads of 44 as published": {"hidden_size": 88, "intermediate_size": 352},
}


@dataclass(frozen=True)
class TinyLlama4Tower(TinyTileTower):
    """theirs: tower and projector of transformers."""

    theirs: tuple[Llama4VisionModel, Llama4MultiModalProjector]
    metadata: TileTower

    CONFIGURATIONS: ClassVar = CONFIGURATIONS
    WIDE: ClassVar = "heads of 44 as published"
    OUT: ClassVar = OUT

    @classmethod
    def of(cls, name: str, seed: int = 0) -> Self:
        """One of CONFIGURATIONS with every parameter random."""
        values = VISION | CONFIGURATIONS[name]
        config = Llama4Config(vision_config=Llama4VisionConfig(**values), text_config={"hidden_size": OUT})
        config.vision_config._attn_implementation = "eager"
        torch.manual_seed(seed)
        tower, projector = Llama4VisionModel(config.vision_config).eval(), Llama4MultiModalProjector(config).eval()
        on_disk = filled({"vision_model.": tower, "multi_modal_projector.": projector}, _values)
        ours = llama4_tower(Fields(values), OUT)
        module, weights = bound(ours, llama4_tower_weights(ours.head_dim), on_disk)
        return cls(module, weights, ours.metadata(), (tower, projector))

    @torch.no_grad()
    def wanted(self, inputs: VisionInputs) -> np.ndarray:
        tower, projector = self.theirs
        pixels = torch.from_numpy(tiles_of(inputs, self.metadata))
        return projector(tower(pixels).last_hidden_state.flatten(0, 1)).numpy()


def _values(name: str, normal: torch.Tensor) -> torch.Tensor:
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.3 * normal
    if "embedding_vlm" in name or "class" in name:
        return 0.5 * normal
    return 0.3 * normal if normal.dim() == 1 else normal * normal[0].numel() ** -0.5
