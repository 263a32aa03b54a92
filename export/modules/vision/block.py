"""The block that most towers are made of."""

from collections.abc import Callable

from torch import Tensor, nn

from moevlm.export.config import VisionConfig
from moevlm.export.modules import ops
from moevlm.export.modules.layers import MLP, RMSNorm

QK_EPSILON = 1e-6  # of norms of whole rows (InternVL)


class VisionAttention(nn.Module):
    """Attention inside each image; q, k and v are packed in one projection. qk_norm: of whole rows of q and of k."""

    def __init__(self, config: VisionConfig, qkv_bias: bool, out_bias: bool, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_norm, self.k_norm = (RMSNorm(config.hidden, QK_EPSILON) if qk_norm else nn.Identity() for _ in range(2))
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=qkv_bias)
        self.out = nn.Linear(config.hidden, config.hidden, bias=out_bias)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, image_start: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        return self.out(ops.segment_attention(q, k, v, cos, sin, image_start, self.heads))


class VisionBlock(nn.Module):
    """Pre-norm attention and feed-forward. norm: makes one from a width and an epsilon."""

    def __init__(
        self,
        config: VisionConfig,
        norm: Callable[[int, float], nn.Module],
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = norm(config.hidden, config.epsilon)
        self.attention = VisionAttention(config, qkv_bias, out_bias, qk_norm)
        self.mlp_norm = norm(config.hidden, config.epsilon)
        self.mlp = MLP(config.hidden, config.mlp)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, image_start: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, image_start)
        return x + self.mlp(self.mlp_norm(x))
