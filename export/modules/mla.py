"""Multi-head latent attention in its absorbed form, and the graph op in it as a torch custom op."""

import torch
from torch import Tensor, nn

from moevlm.export.config import MLAConfig
from moevlm.export.formats.activations import rounded
from moevlm.export.modules import ops
from moevlm.export.modules.layers import RMSNorm
from moevlm.export.modules.mixers import States, StepTensors, register
from moevlm.plugins.ops.head_linear import head_linear as reference_head_linear
from moevlm.plugins.ops.spec import attributes


@torch.library.custom_op("moevlm::head_linear", mutates_args=())
def head_linear(x: Tensor, weight: Tensor, heads: int) -> Tensor:  # noqa: ARG001 - an attribute of the op
    """x [T, heads * K], weight [heads, N, K] -> y [T, heads * N]; see `plugins.ops.head_linear`."""
    rows, group_size = x.detach().numpy(), ops.arithmetic().group_size
    if group_size:
        rows = rounded(rows.reshape(-1, weight.shape[2]), group_size).reshape(rows.shape)
    return torch.from_numpy(reference_head_linear(rows, weight.detach().numpy()))


@head_linear.register_fake
def _(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    return x.new_empty((x.shape[0], heads * weight.shape[1]))


@register(MLAConfig)
class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1), whose cache has one latent for all heads.

    A head's key is a product of the latent, and so is its value. The products are moved: the first to its query, the
    second behind the sum of latents (section 2.1.2: "absorbed"), so that attention is that of many heads on one key,
    of which the first kv_rank dimensions are the value.
    key_up: [heads, kv_rank, nope_dim]. value_up: [heads, value_dim, kv_rank].
    """

    def __init__(self, size: int, config: MLAConfig, epsilon: float) -> None:  # noqa: ARG002 - latents have their own
        super().__init__()
        self.config, self.spec = config, config.spec
        queries, latent = config.heads * (config.nope_dim + config.rope_dim), config.kv_rank
        self.q = None if config.q_rank else nn.Linear(size, queries, bias=False)
        self.q_down = nn.Linear(size, config.q_rank, bias=config.bias) if config.q_rank else None
        self.q_norm = RMSNorm(config.q_rank, config.epsilon) if config.q_rank else None
        self.q_up = nn.Linear(config.q_rank, queries, bias=False) if config.q_rank else None
        self.kv_down = nn.Linear(size, latent + config.rope_dim, bias=config.bias)
        self.kv_norm = RMSNorm(latent, config.epsilon)
        self.key_up = nn.Parameter(torch.empty(config.heads, latent, config.nope_dim))
        self.value_up = nn.Parameter(torch.empty(config.heads, config.value_dim, latent))
        self.out = nn.Linear(config.heads * config.value_dim, size, bias=config.bias)

    def forward(self, x: Tensor, step: StepTensors, states: States) -> tuple[Tensor, States]:
        """x [T, H] -> the same, and the cache of latents with T more tokens."""
        assert step.query_start is not None and step.context_len is not None and step.page_table is not None
        (cache,), config = states, self.config
        latent, turned = self.kv_down(x).split([config.kv_rank, config.rope_dim], 1)
        y, *kept = ops.paged_attention(
            *(self._queries(x, step), torch.cat([self.kv_norm(latent), turned], 1), None),
            *(*step.ropes[config.rope], cache, None),
            *(step.query_start, step.context_len, step.page_table),
            *(None, None, None, None),
            **attributes(self.spec),
        )
        return self.out(head_linear(y, self.value_up, config.heads)), tuple(kept)

    def _queries(self, x: Tensor, step: StepTensors) -> Tensor:
        """[T, heads * (kv_rank + rope_dim)]: each head's query as it meets latents, then what is rotated."""
        config = self.config
        if self.q is not None:
            q = self.q(x)
        else:
            assert self.q_down is not None and self.q_norm is not None and self.q_up is not None
            q = self.q_up(self.q_norm(self.q_down(x)))
        q = step.scaled(q) if config.query_scale else q
        heads = q.unflatten(1, (config.heads, config.nope_dim + config.rope_dim))
        own, turned = heads.split([config.nope_dim, config.rope_dim], 2)
        absorbed = head_linear(own.flatten(1), self.key_up, config.heads).unflatten(1, (config.heads, config.kv_rank))
        return torch.cat([absorbed, turned], 2).flatten(1)
