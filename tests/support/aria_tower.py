"""Tiny towers of Aria with its projector, in transformers and here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from transformers import AriaConfig, AriaModel

from moevlm.export.families.aria_vision import ARIA_LEFT_OUT, ARIA_TOWER, aria_tower
from moevlm.export.families.fields import Fields
from moevlm.runtime.core.towers import QueryTower
from moevlm.runtime.request.images.blocks import block_order
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.vision_towers import TinyTower, bound, filled

VISION: dict[str, Any] = {
    "model_type": "idefics3_vision",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 980,
    "patch_size": 140,
}
OUT = 24
TOP = {"projector_patch_to_query_dict": {"16": 3, "49": 5}}
TEXT = {"model_type": "aria_text", "hidden_size": OUT, "num_attention_heads": 2, "num_hidden_layers": 1}
TEXT |= {"intermediate_size": 8, "moe_num_experts": 2, "vocab_size": 8, "num_key_value_heads": 1, "pad_token_id": 0}
# (of vision_config, of config.json)
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as published": ({}, {}),
    "positions for more than the image, layer named from the front": (
        {"image_size": 19 * 140, "num_hidden_layers": 3},
        {"vision_feature_layer": 3},
    ),
    "positions for less, fewer queries than there are": (
        {"image_size": 600, "patch_size": 245, "layer_norm_eps": 1e-2, "hidden_act": "gelu"},
        {},
    ),
    "one query, heads of 8": (
        {"num_attention_heads": 4, "hidden_act": "silu"},
        {"projector_patch_to_query_dict": {"49": 1}},
    ),
    "heads of 64": ({"hidden_size": 128, "intermediate_size": 64}, {}),
}


@dataclass(frozen=True)
class TinyAriaTower(TinyTower):
    """theirs: the whole model of transformers, of which a little text is part."""

    theirs: AriaModel
    metadata: QueryTower

    CONFIGURATIONS: ClassVar = CONFIGURATIONS
    WIDE: ClassVar = "heads of 64"
    OUT: ClassVar = OUT
    UNPRUNED: ClassVar = frozenset({"patch_embedding.weight", "position_embedding", "queries"})
    SIZES: ClassVar = ((4, 2), (4, 4), (1, 4), (3, 4))

    @classmethod
    def of(cls, name: str, seed: int = 0) -> Self:
        """One of CONFIGURATIONS with every parameter random."""
        vision, top = (given | changed for given, changed in zip((VISION, TOP), CONFIGURATIONS[name], strict=True))
        config = AriaConfig(vision_config=vision, text_config=TEXT, **top)
        torch.manual_seed(seed)
        model = AriaModel._from_config(config, attn_implementation="eager").eval()
        parts = {"model.vision_tower.": model.vision_tower}
        parts |= {"model.multi_modal_projector.": model.multi_modal_projector}
        on_disk = filled(parts, _values)
        ours = aria_tower(Fields(vision), Fields(top), OUT)
        module, weights = bound(ours, ARIA_TOWER, on_disk, ARIA_LEFT_OUT)
        return cls(module, weights, ours.metadata(), model)

    @torch.no_grad()
    def wanted(self, inputs: VisionInputs) -> np.ndarray:
        """In one batch of padded squares; what is behind an image is not zero, so that whoever looks there differs."""
        side, starts = self.metadata.patch_size, inputs.image_start
        pixels = torch.full((len(self.grids), 3, 980, 980), 0.5)
        mask = torch.zeros((len(self.grids), 980, 980), dtype=torch.bool)
        rows, columns = block_order(self.grids, 1)
        for image, (height, width) in enumerate(self.grids):
            own = slice(starts[image], starts[image + 1])
            for row, column, patch in zip(rows[own], columns[own], inputs.pixel_patches[own], strict=True):
                place = np.s_[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                pixels[image][place] = torch.from_numpy(patch).reshape(3, side, side)
            mask[image, : height * side - 1, : width * side - 5] = True  # the last patches are padded in part
        layer = self.theirs.config.vision_feature_layer
        found = self.theirs.get_image_features(pixels, mask, vision_feature_layer=layer).pooler_output
        return found.flatten(0, 1).numpy()


def _values(name: str, normal: torch.Tensor) -> torch.Tensor:
    if "norm" in name:
        return 1 + 0.3 * normal
    if normal.dim() == 1 or "position_embedding" in name or name.endswith("query"):
        return 0.3 * normal
    return normal * normal[0].numel() ** -0.5
