"""The towers of InternVL and Llama 4."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moevlm.export.config import TileVisionConfig
from moevlm.export.modules.layers import ACTIVATIONS, RMSNorm
from moevlm.export.modules.vision.base import register
from moevlm.export.modules.vision.block import VisionBlock


class Projector(nn.Module):
    """merge**2 patches, joined, to a visual token; see `ProjectorConfig`."""

    def __init__(self, config: TileVisionConfig) -> None:
        super().__init__()
        self.width, projector = config.hidden * config.merge_size**2, config.projector
        self.norm = nn.LayerNorm(self.width) if projector.norm else nn.Identity()
        self.activation = ACTIVATIONS[projector.activation]
        sizes = pairwise((self.width, *projector.widths, config.out))
        self.layers = nn.ModuleList(nn.Linear(size, out, bias=projector.bias) for size, out in sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.reshape(-1, self.width))
        for i, layer in enumerate(self.layers):
            x = layer(self.activation(x) if i else x)
        return x


@register(TileVisionConfig)
class TileVision(nn.Module):
    """Patches to visual tokens.

    position_embedding: rows of the patches, block by block, then the class token with its own.
    """

    def __init__(self, config: TileVisionConfig) -> None:
        super().__init__()
        self.config, self.patches = config, config.side**2
        self.patch_embedding = nn.Linear(config.metadata().patch_width, config.hidden, bias=config.patch_bias)
        self.position_embedding = nn.Parameter(torch.empty(self.patches + 1, config.hidden))
        norm = {"layer": nn.LayerNorm, "rms": RMSNorm}[config.norm]
        self.first_norm, self.last_norm = (
            nn.LayerNorm(config.hidden, config.epsilon) if there else nn.Identity()
            for there in (config.first_norm, config.last_norm)
        )
        self.blocks = nn.ModuleList(
            VisionBlock(config, norm, config.qkv_bias, config.out_bias, config.qk_norm) for _ in range(config.depth)
        )
        self.projector = Projector(config)

    def forward(
        self,
        pixel_patches: Tensor,
        *,
        rope_cos: Tensor | None = None,
        rope_sin: Tensor | None = None,
        image_start: Tensor,
    ) -> tuple[Tensor, None]:
        """Embeds [V, H], and no deepstack; inputs as `TileTower` says."""
        x = self._with_class(self.patch_embedding(pixel_patches), 0.0)
        x = self.first_norm((x + self.position_embedding).view(-1, self.config.hidden))
        cos, sin = None, None
        if rope_cos is not None and rope_sin is not None:  # the class token does not turn
            half = rope_cos.shape[1]
            cos, sin = self._with_class(rope_cos, 1.0).view(-1, half), self._with_class(rope_sin, 0.0).view(-1, half)
        start = image_start + image_start // self.patches
        for block in self.blocks:
            x = block(x, cos, sin, start)
        x = x.view(-1, self.patches + 1, self.config.hidden)[:, : self.patches]
        return self.projector(self.last_norm(x)), None

    def _with_class(self, rows: Tensor, value: float) -> Tensor:
        """Rows of patches [P, width], and one of a value behind those of each image: [images, patches + 1, width]."""
        return F.pad(rows.view(-1, self.patches, rows.shape[1]), (0, 0, 0, 1), value=value)
