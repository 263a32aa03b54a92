"""The mixer of linear attention by the gated delta rule, and the graph op in it as a torch custom op."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moevlm.export.config import GatedDeltaConfig
from moevlm.export.modules.layers import ExactLinear, RMSNorm
from moevlm.export.modules.mixers import States, StepTensors, register
from moevlm.plugins.ops.gated_delta import gated_delta as reference_gated_delta
from moevlm.plugins.ops.spec import GatedDeltaSpec, attributes


@torch.library.custom_op("moevlm::gated_delta", mutates_args=())
def gated_delta(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    rate: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    delta_state: Tensor,
    query_start: Tensor,
    state_row: Tensor,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    kernel: int,
    scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, Hv * Dv] and both states after the step; see `plugins.ops.gated_delta` and `GatedDeltaSpec`."""
    tensors = {
        **{"qkv": qkv, "a": a, "b": b, "conv_weight": conv_weight, "rate": rate, "dt_bias": dt_bias},
        **{"conv_state": conv_state, "delta_state": delta_state, "query_start": query_start, "state_row": state_row},
    }
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    spec = GatedDeltaSpec(key_heads, value_heads, key_dim, value_dim, kernel, scale, epsilon)
    y, conv, delta = reference_gated_delta(**arrays, spec=spec)
    return torch.from_numpy(y), torch.from_numpy(conv), torch.from_numpy(delta)


@gated_delta.register_fake
def _(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    conv_state, delta_state = others[5:7]
    y = qkv.new_empty((qkv.shape[0], delta_state.shape[1] * delta_state.shape[3]))
    return y, torch.empty_like(conv_state), torch.empty_like(delta_state)


@register(GatedDeltaConfig)
class GatedDelta(nn.Module):
    """delta_out(norm(rule(qkv(x), a(x), b(x))) * silu(z(x))), the norm over each head (Yang et al. 2025, figure 1).

    conv: [C, kernel], the newest token's weight last. rate: exp(A_log), [Hv].
    """

    def __init__(self, size: int, config: GatedDeltaConfig, epsilon: float) -> None:
        super().__init__()
        self.spec = config.spec
        heads, values = config.value_heads, config.value_heads * config.value_dim
        self.qkv = nn.Linear(size, self.spec.channels, bias=False)
        self.z = nn.Linear(size, values, bias=False)
        self.a = ExactLinear(size, heads)
        self.b = ExactLinear(size, heads)
        self.conv = nn.Parameter(torch.empty(self.spec.channels, config.kernel))
        self.rate = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = RMSNorm(config.value_dim, epsilon)
        self.delta_out = nn.Linear(values, size, bias=False)

    def forward(self, x: Tensor, step: StepTensors, states: States) -> tuple[Tensor, States]:
        """x [T, H] -> the same, and both states behind T more tokens."""
        assert step.query_start is not None and step.state_row is not None
        y, *kept = gated_delta(
            *(self.qkv(x), self.a(x), self.b(x)),
            *(self.conv, self.rate, self.dt_bias, *states),
            *(step.query_start, step.state_row),
            **attributes(self.spec),
        )
        heads = self.norm(y.unflatten(1, (self.spec.value_heads, self.spec.value_dim)))
        return self.delta_out(heads.flatten(1) * F.silu(self.z(x))), tuple(kept)
