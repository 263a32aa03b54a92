"""MoonViT, the tower of Kimi-K2.5."""

import torch
from torch import Tensor, nn

from moevlm.export.config import MLPConfig, MoonVisionConfig
from moevlm.export.modules.layers import MLP
from moevlm.export.modules.vision.base import register
from moevlm.export.modules.vision.block import VisionBlock
from moevlm.export.modules.vision.positions import between


@register(MoonVisionConfig)
class MoonVision(nn.Module):
    """Patches to visual tokens."""

    def __init__(self, config: MoonVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.hidden * config.merge_size**2
        self.patch_embedding = nn.Linear(config.metadata().patch_width, config.hidden)
        self.position_embedding = nn.Parameter(torch.empty(config.position_grid**2, config.hidden))
        self.blocks = nn.ModuleList(
            VisionBlock(config, nn.LayerNorm, qkv_bias=True, out_bias=True) for _ in range(config.depth)
        )
        self.last_norm = nn.LayerNorm(config.hidden, config.epsilon)
        self.projector_norm = nn.LayerNorm(config.hidden, config.projector_epsilon)
        self.projector = MLP(self.width, MLPConfig(self.width, "gelu", gated=False), out=config.out)

    def forward(
        self,
        pixel_patches: Tensor,
        position_index: Tensor,
        position_weight: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        image_start: Tensor,
    ) -> tuple[Tensor, None]:
        """Embeds [V, H], and no deepstack; inputs as `MoonTower` says."""
        x = self.patch_embedding(pixel_patches)
        x = x + between(self.position_embedding, position_index, position_weight)
        for block in self.blocks:
            x = block(x, rope_cos, rope_sin, image_start)
        return self.projector(self.projector_norm(self.last_norm(x)).view(-1, self.width)), None
