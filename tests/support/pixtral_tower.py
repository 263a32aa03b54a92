"""Tiny Pixtral towers with the projector of Mistral 3, in transformers and here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from transformers import Mistral3Config, PixtralVisionModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

from moevlm.export.families.fields import Fields
from moevlm.export.families.pixtral import PIXTRAL_TOWER, pixtral_tower
from moevlm.runtime.core.towers import RotaryTower
from moevlm.runtime.request.images.blocks import block_order
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.vision_towers import TinyTower, bound, filled

VISION: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "image_size": 120,
    "patch_size": 4,
    "rope_theta": 10_000.0,
}
OUT, EPSILON = 24, 3e-3
TEXT = {"model_type": "mistral", "hidden_size": OUT, "rms_norm_eps": EPSILON, "num_hidden_layers": 1}
# (of vision_config, of config.json)
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as published": ({}, {}),
    "biases, layer named from the front, another base": (
        {"hidden_act": "gelu", "rope_theta": 100.0},
        {"multimodal_projector_bias": True, "vision_feature_layer": 2},
    ),
    "merge of 3, three blocks, patches of 3": (
        {"num_hidden_layers": 3, "patch_size": 3},
        {"spatial_merge_size": 3, "projector_hidden_act": "silu"},
    ),
    "no merge, heads of 8": (
        {"num_attention_heads": 4, "head_dim": 8, "hidden_act": "gelu_pytorch_tanh"},
        {"spatial_merge_size": 1},
    ),
    "heads of 64": ({"hidden_size": 128, "head_dim": 64, "intermediate_size": 64}, {}),
}


@dataclass(frozen=True)
class TinyPixtralTower(TinyTower):
    """theirs: tower and projector of transformers."""

    theirs: tuple[PixtralVisionModel, Mistral3MultiModalProjector]
    metadata: RotaryTower

    CONFIGURATIONS: ClassVar = CONFIGURATIONS
    WIDE: ClassVar = "heads of 64"
    OUT: ClassVar = OUT
    UNPRUNED: ClassVar = frozenset({"patch_embedding.weight"})

    @classmethod
    def of(cls, name: str, seed: int = 0) -> Self:
        """One of CONFIGURATIONS with every parameter random."""
        vision, top = CONFIGURATIONS[name]
        values = VISION | vision
        config = Mistral3Config(vision_config=values, text_config=TEXT, **top)
        config.vision_config._attn_implementation = "eager"
        torch.manual_seed(seed)
        tower, projector = PixtralVisionModel(config.vision_config).eval(), Mistral3MultiModalProjector(config).eval()
        on_disk = filled({"model.vision_tower.": tower, "model.multi_modal_projector.": projector}, _values)
        ours = pixtral_tower(Fields(values), Fields(top), OUT, EPSILON)
        module, weights = bound(ours, PIXTRAL_TOWER, on_disk)
        return cls(module, weights, ours.metadata(), (tower, projector))

    @torch.no_grad()
    def wanted(self, inputs: VisionInputs) -> np.ndarray:
        """In one padded batch."""
        vision, starts, grids = self.metadata, inputs.image_start, self.grids
        side = vision.patch_size
        pixels = np.zeros((len(grids), 3, *(side * max(axis) for axis in zip(*grids, strict=True))), np.float32)
        rows, columns = block_order(grids, vision.merge_size)
        for image in range(len(grids)):
            own = slice(starts[image], starts[image + 1])
            for row, column, patch in zip(rows[own], columns[own], inputs.pixel_patches[own], strict=True):
                place = np.s_[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                pixels[image][place] = patch.reshape(3, side, side)
        shapes = torch.tensor(grids) * side
        tower, projector = self.theirs
        states = tower(torch.from_numpy(pixels), image_sizes=shapes, output_hidden_states=True).hidden_states
        layer = projector.patch_merger.config.vision_feature_layer
        return projector(states[layer].squeeze(0), shapes).numpy()


def _values(name: str, normal: torch.Tensor) -> torch.Tensor:
    if "norm" in name or "ln_pre" in name:
        return 1 + 0.3 * normal
    return 0.3 * normal if normal.dim() == 1 else normal * normal[0].numel() ** -0.5
