"""The language model: embedding with the image rows merged in, layers of attention and (sparse) feed-forward, head.

Tokens are rows, [T, H] with T = B * S, everywhere but inside attention: every projection is then one Gemm on the
weight as the checkpoint stores it, and the MoE ops need no reshaping.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moevlm.export.config import AttentionConfig, DecoderConfig, MoEConfig
from moevlm.export.modules import ops
from moevlm.export.modules.layers import MLP, MoE, RMSNorm

VisualRows = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) on a fixed-capacity cache."""

    def __init__(self, size: int, config: AttentionConfig, epsilon: float) -> None:
        super().__init__()
        self.config = config
        q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(size, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(size, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(size, kv_width, bias=config.qkv_bias)
        self.out = nn.Linear(q_width, size, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, epsilon) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor], cache_position: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [T, H] -> the same, and the caches [B, kv_heads, C, D] with S more entries."""
        q, k, v = self._per_head(self.q(x), self.q_norm), self._per_head(self.k(x), self.k_norm), self.v(x)
        y, key_cache, value_cache = ops.cached_attention(
            q, k, v, cos, sin, *cache, cache_position, self.config.heads, self.config.kv_heads, self.config.rotary_dim
        )
        return self.out(y), (key_cache, value_cache)

    def _per_head(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        return x if norm is None else norm(x.unflatten(-1, (-1, self.config.head_dim))).flatten(1)


class Layer(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        feed_forward = config.feed_forward[index]
        self.attention_norm = RMSNorm(config.hidden, config.epsilon)
        self.attention = Attention(config.hidden, config.attention, config.epsilon)
        self.feed_forward_norm = RMSNorm(config.hidden, config.epsilon)
        if isinstance(feed_forward, MoEConfig):
            self.feed_forward: MoE | MLP = MoE(config.hidden, feed_forward, f"layers.{index}")
        else:
            self.feed_forward = MLP(config.hidden, feed_forward)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor], cache_position: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, cache = self.attend(x, cos, sin, cache, cache_position)
        return self.feed(x), cache

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor], cache_position: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The first half: tokens see those of their sequence."""
        y, cache = self.attention(self.attention_norm(x), cos, sin, cache, cache_position)
        return x + y, cache

    def feed(self, x: Tensor) -> Tensor:
        """The second half: every token for itself."""
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """One graph for prefill, chunked prefill and decode."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary, config.hidden))
        self.layers = nn.ModuleList(Layer(config, i) for i in range(len(config.feed_forward)))
        self.norm = RMSNorm(config.hidden, config.epsilon)
        self.head = None if config.tied_head else nn.Parameter(torch.empty(config.vocabulary, config.hidden))

    def forward(
        self,
        input_ids: Tensor,
        visual_embeds: Tensor,
        deepstack_embeds: Tensor | None,
        visual_index: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        cache_position: Tensor,
        logits_index: Tensor,
        caches: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Shapes and dtypes as `runtime.engine.protocol.Step`; caches: per layer key and value [B, kv_heads, C, D].

        Returns logits [N, vocabulary] and the updated caches.
        """
        visual = visual_rows(visual_index)
        x = self.embed(input_ids, visual_embeds, visual)
        updated = []
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            x, cache = layer(x, rope_cos, rope_sin, cache, cache_position)
            x = ops.tap(self.add_deepstack(i, x, deepstack_embeds, visual), f"layers.{i}.hidden")
            updated.append(cache)
        return self.logits(x, logits_index), updated

    def embed(self, input_ids: Tensor, visual_embeds: Tensor, visual: VisualRows) -> Tensor:
        """The residual stream before the first layer."""
        row, is_visual = visual
        return torch.where(is_visual, F.embedding(row, visual_embeds), F.embedding(input_ids.flatten(), self.embedding))

    def add_deepstack(self, i: int, x: Tensor, deepstack_embeds: Tensor | None, visual: VisualRows) -> Tensor:
        """Add the image features of layer i: the first layers get another level each (DeepStack)."""
        if deepstack_embeds is None or i >= self.config.deepstack:
            return x
        row, is_visual = visual
        return x + torch.where(is_visual, F.embedding(row, deepstack_embeds[i]), 0.0)

    def logits(self, x: Tensor, logits_index: Tensor) -> Tensor:
        """[N, vocabulary] of the rows asked for, from the residual stream behind the last layer."""
        x = self.norm(x.index_select(0, logits_index))
        return F.linear(x, self.embedding if self.head is None else self.head)


def visual_rows(visual_index: Tensor) -> VisualRows:
    """Per token the row of its visual features, 0 for text, and whether it has one: [T] and [T, 1]."""
    visual_index = visual_index.flatten()
    return visual_index.clamp(min=0), (visual_index >= 0).unsqueeze(-1)
