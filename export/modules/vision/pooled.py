"""The tower of Gemma 4."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moevlm.export.config import PooledVisionConfig
from moevlm.export.modules import ops
from moevlm.export.modules.layers import MLP, RMSNorm
from moevlm.export.modules.vision.base import register


class NormedAttention(nn.Module):
    """Attention inside each image, of queries, keys and values that are normed by head; values have no gain."""

    def __init__(self, config: PooledVisionConfig) -> None:
        super().__init__()
        self.heads, self.head_dim, self.epsilon = config.heads, config.head_dim, config.epsilon
        width = config.heads * config.head_dim
        self.qkv = nn.Linear(config.hidden, 3 * width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.epsilon)
        self.k_norm = RMSNorm(config.head_dim, config.epsilon)
        self.out = nn.Linear(width, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, image_start: Tensor) -> Tensor:
        heads = [rows.unflatten(1, (self.heads, self.head_dim)) for rows in self.qkv(x).chunk(3, dim=-1)]
        q, k = self.q_norm(heads[0]).flatten(1), self.k_norm(heads[1]).flatten(1)
        v = F.rms_norm(heads[2], (self.head_dim,), None, self.epsilon).flatten(1)
        return self.out(ops.segment_attention(q, k, v, cos, sin, image_start, self.heads))


class SandwichBlock(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: PooledVisionConfig) -> None:
        super().__init__()
        self.attention = NormedAttention(config)
        self.mlp = MLP(config.hidden, config.mlp)
        self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm = (
            RMSNorm(config.hidden, config.epsilon) for _ in range(4)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, image_start: Tensor) -> Tensor:
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), cos, sin, image_start))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


@register(PooledVisionConfig)
class PooledVision(nn.Module):
    """Patches to visual tokens. standard_bias, standard_gain: for pooled patches that are not scaled beforehand."""

    def __init__(self, config: PooledVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(config.metadata().patch_width, config.hidden, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(2 * config.position_table, config.hidden))
        self.blocks = nn.ModuleList(SandwichBlock(config) for _ in range(config.depth))
        self.standard_bias = nn.Parameter(torch.empty(config.hidden)) if config.standardize else None
        self.standard_gain = nn.Parameter(torch.empty(config.hidden)) if config.standardize else None
        self.projection = nn.Linear(config.hidden, config.out, bias=False)

    def forward(
        self, pixel_patches: Tensor, position_index: Tensor, rope_cos: Tensor, rope_sin: Tensor, image_start: Tensor
    ) -> tuple[Tensor, None]:
        """Embeds [V, H], and no deepstack; inputs as `PooledTower` says."""
        x = self.patch_embedding(pixel_patches) + F.embedding(position_index, self.position_embedding).sum(1)
        for block in self.blocks:
            x = block(x, rope_cos, rope_sin, image_start)
        # Patches of a token follow each other. Their mean is over the first of two axes, where ONNX Runtime adds in one
        # order, see `positions.between`. Times the root of the width, it may be beyond float16.
        x = x.view(-1, self.config.merge_size**2, self.config.hidden).transpose(0, 1).flatten(1).mean(0)
        x = x.view(-1, self.config.hidden)
        if self.standard_bias is None or self.standard_gain is None:
            x = x * self.config.hidden**0.5
        else:
            x = (x - self.standard_bias) * self.standard_gain
        return self.projection(F.rms_norm(x, (self.config.hidden,), None, self.config.epsilon)), None
