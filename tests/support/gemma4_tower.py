"""Tiny towers of Gemma 4 with their projector, in transformers and here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from transformers import Gemma4TextConfig, Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder, Gemma4VisionModel

from moevlm.export.families.fields import Fields
from moevlm.export.families.gemma4_vision import GEMMA4_TOWER, gemma4_tower
from moevlm.runtime.core.towers import PooledTower
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.vision_towers import TinyTower, bound, filled

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 64,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    "standardize": True,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "standardized": {},
    "plain means": {"standardize": False},
    "heads wider than rows, pool of 2": {"num_attention_heads": 3, "num_key_value_heads": 3, "pooling_kernel_size": 2},
    "heads of 8, pool of 4, another base": {
        "head_dim": 8,
        "pooling_kernel_size": 4,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10_000.0},
        "rms_norm_eps": 1e-3,
    },
    "three blocks, patches of 3": {"num_hidden_layers": 3, "patch_size": 3},
    "heads of 72 as published": {"hidden_size": 144, "head_dim": 72, "intermediate_size": 64},
}
OUT = 24


@dataclass(frozen=True)
class TinyGemma4Tower(TinyTower):
    """theirs: tower and projector of transformers."""

    theirs: tuple[Gemma4VisionModel, Gemma4MultimodalEmbedder]
    metadata: PooledTower

    CONFIGURATIONS: ClassVar = CONFIGURATIONS
    WIDE: ClassVar = "heads of 72 as published"
    OUT: ClassVar = OUT
    ROUNDING: ClassVar = 0.03

    @classmethod
    def of(cls, name: str, seed: int = 0) -> Self:
        """One of CONFIGURATIONS with every parameter and buffer random."""
        values = BASE | CONFIGURATIONS[name]
        config = Gemma4VisionConfig(**values)
        config._attn_implementation = "eager"
        torch.manual_seed(seed)
        tower = Gemma4VisionModel(config).eval()
        projector = Gemma4MultimodalEmbedder(config, Gemma4TextConfig(hidden_size=OUT)).eval()
        on_disk = filled({"model.vision_tower.": tower, "model.embed_vision.": projector}, _values)
        ours = gemma4_tower(Fields(values), OUT)
        module, weights = bound(ours, GEMMA4_TOWER, on_disk)
        return cls(module, weights, ours.metadata(), (tower, projector))

    @torch.no_grad()
    def wanted(self, inputs: VisionInputs) -> np.ndarray:
        """In one padded batch; a place of -1 has no patch."""
        sizes, table = np.diff(inputs.image_start), self.metadata.position_table
        patches = np.zeros((len(sizes), sizes.max(), self.metadata.patch_width), np.float32)
        places = np.full((len(sizes), sizes.max(), 2), -1, np.int64)
        for image, size in enumerate(sizes):
            part = inputs.part(image, image + 1)
            patches[image, :size] = (part.pixel_patches + 1) / 2
            places[image, :size] = part.rows["position_index"] - [0, table]
        tower, projector = self.theirs
        given = torch.from_numpy(patches), torch.from_numpy(places)
        return projector(tower(pixel_values=given[0], pixel_position_ids=given[1]).last_hidden_state).numpy()


def _values(name: str, normal: torch.Tensor) -> torch.Tensor:
    if name.endswith(("q_norm.weight", "k_norm.weight")):  # scores have no scale: these keep them from being extreme
        return 0.35 + 0.1 * normal
    if name.endswith(("norm.weight", "std_scale")):
        return 1 + 0.3 * normal
    return normal * (0.5 if "std" in name or "position" in name else normal.shape[-1] ** -0.5)
