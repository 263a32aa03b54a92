"""The modules in which tokens see each other: one per mixer config, found by its class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moevlm.export.config import GQAConfig, MixerConfig
from moevlm.export.modules import ops
from moevlm.export.modules.layers import RMSNorm
from moevlm.plugins.ops.spec import attributes

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class StepTensors:
    """The sequences of a step, for T tokens; shapes and dtypes as `runtime.engine.step.Step`.

    ropes: cos and sin [T, R / 2] by rope group. is_image: [T, 1] bool, the tokens that go to experts for images.
    None: what no layer of the model needs.
    """

    ropes: tuple[tuple[Tensor, Tensor], ...]
    query_start: Tensor | None
    context_len: Tensor | None
    page_table: Tensor | None
    state_row: Tensor | None
    visible_end: Tensor | None = None
    query_scale: Tensor | None = None
    is_image: Tensor | None = None

    def scaled(self, q: Tensor) -> Tensor:
        """Queries [T, N] times the factor of their places."""
        assert self.query_scale is not None
        return q * self.query_scale.unsqueeze(1)


# The module of a mixer: made from the width of rows, its config and the epsilon of norms. Its forward takes x [T, H],
# the step and the layer's states, and returns y [T, H] and the states after the step.
Maker = Callable[[int, Any, float], nn.Module]

_MAKERS: dict[type[MixerConfig], Maker] = {}


def register(config: type[MixerConfig]) -> Callable[[Maker], Maker]:
    """Class decorator: the module of mixers that this config describes."""

    def add(maker: Maker) -> Maker:
        _MAKERS[config] = maker
        return maker

    return add


def mixer(size: int, config: MixerConfig, epsilon: float) -> nn.Module:
    """The module of a mixer on rows of width `size`. epsilon: of its norms."""
    return _MAKERS[type(config)](size, config, epsilon)


@register(GQAConfig)
class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) over pages of keys and values."""

    def __init__(self, size: int, config: GQAConfig, epsilon: float) -> None:
        super().__init__()
        self.config, self.spec = config, config.spec(epsilon)
        value_dim = config.value_dim or config.head_dim
        self.q = nn.Linear(size, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(size, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = None if config.value_is_key else nn.Linear(size, config.kv_heads * value_dim, bias=config.qkv_bias)
        self.gate = nn.Linear(size, config.heads * value_dim, bias=config.qkv_bias) if config.output_gate else None
        self.out = nn.Linear(config.heads * value_dim, size, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, epsilon) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(config.heads)) if config.sinks else None

    def forward(self, x: Tensor, step: StepTensors, states: States) -> tuple[Tensor, States]:
        """x [T, H] -> the same, and the key and value cache with T more tokens."""
        assert step.query_start is not None and step.context_len is not None and step.page_table is not None
        cos, sin = step.ropes[self.config.rope] if self.spec.rotary_dim else (None, None)
        q_norm, k_norm = (None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        q, k = self.q(x), self.k(x)  # in the order in which a kernel takes them side by side
        q = step.scaled(q) if self.config.query_scale else q
        y, *caches = ops.paged_attention(
            *(q, k, None if self.v is None else self.v(x)),
            *(cos, sin, *states),
            *(step.query_start, step.context_len, step.page_table),
            *(q_norm, k_norm, self.sinks),
            step.visible_end if self.config.bidirectional_images else None,
            **attributes(self.spec),
        )
        y = y if self.gate is None else y * torch.sigmoid(self.gate(x))
        return self.out(y), tuple(caches)
