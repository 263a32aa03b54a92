"""Tiny MoonViT towers with the projector of Kimi-K2.5, in transformers and here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from transformers import Kimi_K25Config
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25MultimodalProjection, Kimi_K25VisionModel

from moevlm.export.families.fields import Fields
from moevlm.export.families.moon import moon_tower, moon_weights
from moevlm.export.graph.weights import Constant, Weight, read
from moevlm.runtime.core.towers import MoonTower
from moevlm.runtime.request.images.blocks import block_order
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.vision_towers import TinyTower, bound, filled

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "pos_emb_height": 5,
    "pos_emb_width": 5,
    "merge_kernel_size": [2, 2],
}
OUT = 24
TEXT = {"model_type": "deepseek_v3", "hidden_size": OUT, "num_hidden_layers": 1}
# (of vision_config, of config.json)
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as published": ({}, {}),
    "merge of 3, another base and epsilon": (
        {"merge_kernel_size": [3, 3], "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
        {"projection_layer_norm_eps": 1e-2},
    ),
    "no merge, four heads, three blocks, patches of 3": (
        {"merge_kernel_size": [1, 1], "num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": 3},
        {},
    ),
    "heads of 72, larger table": (
        {"hidden_size": 144, "intermediate_size": 64, "pos_emb_height": 8, "pos_emb_width": 8},
        {},
    ),
}


@dataclass(frozen=True)
class TinyMoonTower(TinyTower):
    """theirs: tower and projector of transformers."""

    theirs: tuple[Kimi_K25VisionModel, Kimi_K25MultimodalProjection]
    metadata: MoonTower

    CONFIGURATIONS: ClassVar = CONFIGURATIONS
    WIDE: ClassVar = "heads of 72, larger table"
    OUT: ClassVar = OUT

    @classmethod
    def of(cls, name: str, seed: int = 0, published: bool = False) -> Self:
        """One of CONFIGURATIONS with every parameter random. published: read from the names and order of the hub."""
        vision, top = CONFIGURATIONS[name]
        values = VISION | vision
        top = top | {"projection_hidden_size": values["hidden_size"]}
        config = Kimi_K25Config(vision_config=values, text_config=TEXT, **top)
        config.vision_config._attn_implementation = "eager"
        torch.manual_seed(seed)
        tower, projector = Kimi_K25VisionModel(config.vision_config).eval(), Kimi_K25MultimodalProjection(config).eval()
        on_disk = filled({"model.vision_tower.": tower, "model.mm_projector.": projector}, _values)
        ours = moon_tower(Fields(values), Fields(top), OUT)
        table = moon_weights(ours.head_dim)
        module, weights = bound(ours, table, as_published(on_disk, ours.heads) if published else on_disk)
        return cls(module, weights, ours.metadata(), (tower, projector))

    @torch.no_grad()
    def wanted(self, inputs: VisionInputs) -> np.ndarray:
        merge, side = self.metadata.merge_size, self.metadata.patch_size
        grids = [(h * merge, w * merge) for h, w in self.sizes]
        rows, columns = block_order(grids, merge)
        image = np.repeat(np.arange(len(grids)), np.diff(inputs.image_start))
        patches = inputs.pixel_patches[np.lexsort((columns, rows, image))].reshape(-1, 3, side, side)
        tower, projector = self.theirs
        pooled = tower(torch.from_numpy(patches), torch.tensor([(1, *grid) for grid in grids])).pooler_output
        return projector(pooled).squeeze(1).numpy()


RENAMED = {
    "layers.": "encoder.blocks.",
    "final_layernorm": "encoder.final_layernorm",
    ".norm1.": ".norm0.",
    ".norm2.": ".norm1.",
    "mlp.fc1.": "mlp.fc0.",
    "mlp.fc2.": "mlp.fc1.",
    "attn.proj.": "wo.",
    "in_proj.": "proj.0.",
    "out_proj.": "proj.2.",
    "position_embeddings": "weight",
    "model.": "",
}


def as_published(on_disk: dict[str, Weight], heads: int) -> dict[str, Weight]:
    """The names of the hub; q, k and v in one tensor, in whose heads the dimensions of a pair lie side by side."""
    made = {}
    for name, weight in on_disk.items():
        if ".q_proj." in name:
            parts = [read(on_disk[name.replace(".q_proj.", f".{part}_proj.")]) for part in "qkv"]
            halves = [part.reshape(heads, 2, -1, *part.shape[1:]).swapaxes(1, 2) for part in parts[:2]]
            whole = np.concatenate([*(half.reshape(parts[0].shape) for half in halves), parts[2]])
            made[name.replace(".attn.q_proj.", ".wqkv.")] = Constant(np.ascontiguousarray(whole))
        elif ".k_proj." not in name and ".v_proj." not in name:
            made[name] = weight
    for theirs, hub in RENAMED.items():
        made = {name.replace(theirs, hub, 1): weight for name, weight in made.items()}
    return made


def _values(name: str, normal: torch.Tensor) -> torch.Tensor:
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.3 * normal
    if "position_embeddings" in name:
        return normal
    return 0.3 * normal if normal.dim() == 1 else normal * normal[0].numel() ** -0.5
