"""The tower of Pixtral."""

from torch import Tensor, nn

from moevlm.export.config import RotaryVisionConfig
from moevlm.export.modules.layers import ACTIVATIONS, RMSNorm
from moevlm.export.modules.vision.base import register
from moevlm.export.modules.vision.block import VisionBlock


class JoiningMerger(nn.Module):
    """merge**2 normed patches to one of their width, then down(act(up)) to a visual token (Mistral 3)."""

    def __init__(self, config: RotaryVisionConfig) -> None:
        super().__init__()
        self.width = config.hidden * config.merge_size**2
        self.norm = RMSNorm(config.hidden, config.joined_epsilon)
        self.join = nn.Linear(self.width, config.hidden, bias=False)
        self.activation = ACTIVATIONS[config.projector_activation]
        self.up = nn.Linear(config.hidden, config.out, bias=config.projector_bias)
        self.down = nn.Linear(config.out, config.out, bias=config.projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(self.join(self.norm(x).view(-1, self.width)))))


@register(RotaryVisionConfig)
class RotaryVision(nn.Module):
    """Patches to visual tokens."""

    def __init__(self, config: RotaryVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(config.metadata().patch_width, config.hidden, bias=False)
        self.first_norm = RMSNorm(config.hidden, config.epsilon)
        self.blocks = nn.ModuleList(
            VisionBlock(config, RMSNorm, qkv_bias=False, out_bias=False) for _ in range(config.depth)
        )
        self.merger = JoiningMerger(config)

    def forward(
        self, pixel_patches: Tensor, rope_cos: Tensor, rope_sin: Tensor, image_start: Tensor
    ) -> tuple[Tensor, None]:
        """Embeds [V, H], and no deepstack; inputs as `RotaryTower` says."""
        x = self.first_norm(self.patch_embedding(pixel_patches))
        for block in self.blocks:
            x = block(x, rope_cos, rope_sin, image_start)
        return self.merger(x), None
