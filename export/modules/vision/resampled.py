"""The tower of ERNIE 4.5 VL, and its resampler."""

from torch import Tensor, nn
from torch.nn import functional as F

from moevlm.export.config import ResampledVisionConfig
from moevlm.export.modules.layers import RMSNorm
from moevlm.export.modules.vision.base import register
from moevlm.export.modules.vision.block import VisionBlock


class ResamplerLayer(nn.Module):
    """norm(down(gelu(up(x)))), all of one width."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(F.gelu(self.up(x))))


@register(ResampledVisionConfig)
class ResampledVision(nn.Module):
    """Patches to visual tokens.

    temporal: its first projection is on two frames in transformers; those of an image are the same, so the weights of
    both are added when they are read.
    """

    def __init__(self, config: ResampledVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.hidden * config.merge_size**2
        self.patch_embedding = nn.Linear(config.metadata().patch_width, config.hidden, bias=False)
        self.blocks = nn.ModuleList(
            VisionBlock(config, nn.LayerNorm, qkv_bias=True, out_bias=True) for _ in range(config.depth)
        )
        self.last_norm = nn.LayerNorm(config.hidden, config.epsilon)
        self.spatial = ResamplerLayer(self.width, config.epsilon)
        self.temporal = ResamplerLayer(self.width, config.epsilon)
        self.projection = nn.Linear(self.width, config.out)
        self.out_norm = RMSNorm(config.out, config.out_epsilon)

    def forward(
        self, pixel_patches: Tensor, rope_cos: Tensor, rope_sin: Tensor, image_start: Tensor
    ) -> tuple[Tensor, None]:
        """Embeds [V, H], and no deepstack; inputs as `ResampledTower` says."""
        x = self.patch_embedding(pixel_patches)
        for block in self.blocks:
            x = block(x, rope_cos, rope_sin, image_start)
        x = self.temporal(self.spatial(self.last_norm(x).view(-1, self.width)))
        return self.out_norm(self.projection(x)), None
