"""The towers of Qwen3-VL and GLM-4V."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moevlm.export.config import GridVisionConfig, MLPConfig
from moevlm.export.modules.layers import MLP, RMSNorm
from moevlm.export.modules.vision.base import register
from moevlm.export.modules.vision.block import VisionBlock
from moevlm.export.modules.vision.positions import between

LAYER_NORM_EPSILON = 1e-6  # of Qwen's mergers; GLM's merger keeps torch's default


class MLPMerger(nn.Module):
    """merge**2 patches to one token: norm (before or after they are joined), then fc2(gelu(fc1)) (Qwen3-VL)."""

    def __init__(self, config: GridVisionConfig, norm_joined: bool) -> None:
        super().__init__()
        self.width = config.hidden * config.merge_size**2
        self.norm_joined = norm_joined
        self.norm = nn.LayerNorm(self.width if norm_joined else config.hidden, LAYER_NORM_EPSILON)
        self.mlp = MLP(self.width, MLPConfig(config.merger.width, "gelu", gated=False), out=config.out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.width)) if self.norm_joined else self.norm(x).view(-1, self.width)
        return self.mlp(x)


class GatedMerger(nn.Module):
    """A strided convolution as one projection, then proj, layer norm, gelu and a gated feed-forward (GLM-4V)."""

    def __init__(self, config: GridVisionConfig) -> None:
        super().__init__()
        out = config.out
        self.width = config.hidden * config.merge_size**2
        self.downsample = nn.Linear(self.width, out)
        self.projection = nn.Linear(out, out, bias=False)
        self.norm = nn.LayerNorm(out)
        self.mlp = MLP(out, MLPConfig(config.merger.width, config.mlp.activation))

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(self.downsample(x.view(-1, self.width)))
        return self.mlp(F.gelu(self.norm(x)))


@register(GridVisionConfig)
class GridVision(nn.Module):
    """Patches to visual tokens."""

    def __init__(self, config: GridVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(config.metadata().patch_width, config.hidden)
        self.position_embedding = nn.Parameter(torch.empty(config.position_grid**2, config.hidden))
        self.first_norm = RMSNorm(config.hidden, config.epsilon) if config.outer_norms else nn.Identity()
        norm = {"layer": nn.LayerNorm, "rms": RMSNorm}[config.norm]
        self.blocks = nn.ModuleList(
            VisionBlock(config, norm, config.qkv_bias, config.out_bias) for _ in range(config.depth)
        )
        self.last_norm = RMSNorm(config.hidden, config.epsilon) if config.outer_norms else nn.Identity()
        self.merger = GatedMerger(config) if config.merger.kind == "gated" else MLPMerger(config, norm_joined=False)
        self.deepstack_mergers = nn.ModuleList(MLPMerger(config, norm_joined=True) for _ in config.deepstack_layers)

    def forward(
        self,
        pixel_patches: Tensor,
        position_index: Tensor,
        position_weight: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        image_start: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeds [V, H] and deepstack [L, V, H] or None; inputs as `GridTower` says."""
        x = self.first_norm(self.patch_embedding(pixel_patches))
        x = x + between(self.position_embedding, position_index, position_weight)
        levels = []
        for i, block in enumerate(self.blocks):
            x = block(x, rope_cos, rope_sin, image_start)
            if i in self.config.deepstack_layers:  # levels follow the blocks, mergers the list
                levels.append(self.deepstack_mergers[self.config.deepstack_layers.index(i)](x))
        embeds = self.merger(self.last_norm(x))
        return embeds, torch.stack(levels) if levels else None
