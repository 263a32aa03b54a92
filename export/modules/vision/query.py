"""The tower of Aria."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moevlm.export.config import QueryVisionConfig
from moevlm.export.modules import ops
from moevlm.export.modules.vision.base import register
from moevlm.export.modules.vision.block import VisionBlock


def _twice(size: int) -> nn.Sequential:
    """Two projections in a row, the second with a bias: what attention makes of what was projected before it."""
    return nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size))


@register(QueryVisionConfig)
class QueryVision(nn.Module):
    """Patches to visual tokens.

    queries: [queries, hidden], what each visual token asks of the patches of its image, whatever these show.
    """

    def __init__(self, config: QueryVisionConfig) -> None:
        super().__init__()
        self.config, hidden = config, config.hidden
        self.patch_embedding = nn.Linear(config.metadata().patch_width, hidden)
        self.position_embedding = nn.Parameter(torch.empty(config.position_grid**2, hidden))
        self.blocks = nn.ModuleList(
            VisionBlock(config, nn.LayerNorm, qkv_bias=True, out_bias=True) for _ in range(config.depth)
        )
        self.queries = nn.Parameter(torch.empty(config.queries, hidden))
        self.query_norm, self.patch_norm, self.norm = (nn.LayerNorm(hidden) for _ in range(3))
        self.asked, self.keys, self.values = (_twice(hidden) for _ in range(3))
        self.out, self.joined = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, config.out, bias=False), nn.Linear(config.out, config.out, bias=False)

    def forward(self, pixel_patches: Tensor, position_index: Tensor, image_start: Tensor) -> tuple[Tensor, None]:
        """Embeds [V, H], and no deepstack; inputs as `QueryTower` says."""
        x = self.patch_embedding(pixel_patches) + F.embedding(position_index, self.position_embedding).sum(1)
        for block in self.blocks:
            x = block(x, None, None, image_start)
        x, q = self.patch_norm(x), self.asked(self.query_norm(self.queries))
        y = ops.cross_attention(q, self.keys(x), self.values(x), image_start, self.config.heads)
        y = self.norm(self.joined(self.out(y.view(-1, self.config.hidden))))
        return self.down(F.gelu(self.up(y), approximate="tanh")), None
