"""Blocks that both towers share: norms, dense feed-forward layers, the sparse one."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moevlm.export.config import MLPConfig, MoEConfig
from moevlm.export.modules import ops
from moevlm.plugins.ops.spec import attributes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(x * 1.702),
}


IMAGES = ".images."  # in names of the weights of experts for images


class ExactLinear(nn.Linear):
    """A projection to few numbers that decide much: which experts are chosen, what a state keeps.

    No quantized target rounds its weight or what it reads. On a GPU it takes the engine's dtype, but for a router's.
    """

    def __init__(self, size: int, out: int, bias: bool = False) -> None:
        super().__init__(size, out, bias=bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class MLP(nn.Module):
    """gated: down(act(gate(x)) * up(x)); plain: down(act(up(x))), with biases."""

    def __init__(self, size: int, config: MLPConfig, out: int | None = None) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(size, config.width, bias=False) if config.gated else None
        self.up = nn.Linear(size, config.width, bias=not config.gated)
        self.down = nn.Linear(config.width, out or size, bias=not config.gated)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        return self.down(hidden)


class MoE(nn.Module):
    """A router, E experts of which k run for each token, and an optional shared expert that always runs.

    x [T, H] -> [T, H]. gate_up [E, 2I, H]: gate rows first. down [E, H, I]. Their biases: [E, 2I] and [E, H].
    """

    def __init__(self, size: int, config: MoEConfig, name: str) -> None:
        super().__init__()
        self.config, self.name = config, name
        rows = 2 * config.width if config.expert.gated else config.width
        self.router = ExactLinear(size, config.experts, config.router_bias)
        self.correction_bias = nn.Parameter(torch.empty(config.experts)) if config.correction_bias else None
        self.expert_scale = nn.Parameter(torch.empty(config.experts)) if config.expert_scale else None
        self.gate_up = nn.Parameter(torch.empty(config.experts, rows, size))
        self.down = nn.Parameter(torch.empty(config.experts, size, config.width))
        self.gate_up_bias = nn.Parameter(torch.empty(config.experts, rows)) if config.expert_biases else None
        self.down_bias = nn.Parameter(torch.empty(config.experts, size)) if config.expert_biases else None
        shared = MLPConfig(config.shared_width, config.expert.activation)
        self.shared = MLP(size, shared) if config.shared_width else None
        self.shared_gate = ExactLinear(size, 1) if config.shared_gate else None

    @property
    def of_experts(self) -> list[nn.Parameter]:
        """Weights and biases of all experts."""
        given = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return [parameter for parameter in given if parameter is not None]

    @property
    def idle_parameters(self) -> int:
        """Weights of the experts that a token is not sent to."""
        each = sum(parameter.numel() for parameter in self.of_experts) // self.config.experts
        return each * (self.config.experts - self.config.router.top_k)

    def forward(self, x: Tensor, is_image: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return self.with_shared(x, self.routed(x, x))

    def with_shared(self, x: Tensor, y: Tensor) -> Tensor:
        """y [T, H], plus what the shared expert makes of x [T, H], if there is one."""
        if self.shared is None:
            return y
        always = self.shared(x)
        return y + (always if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * always)

    def routed(self, x: Tensor, router_rows: Tensor) -> Tensor:
        """x [T, H] through the experts that the router chooses by its own rows [T, H]."""
        logits = ops.tap(self.router(router_rows), f"{self.name}.router_logits")
        index, weight = self.route(logits)
        index, weight = ops.tap(index, f"{self.name}.expert_index"), ops.tap(weight, f"{self.name}.expert_weight")
        return self.through(x, index, weight)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> expert_index [T, k] int32 and expert_weight [T, k]."""
        index, weight = ops.router(logits, self.correction_bias, self.expert_scale, **attributes(self.config.router))
        return index, weight

    def through(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """x [T, H] through these experts, of which -1 is none."""
        weights = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return ops.experts(x, index, weight, *weights, **attributes(self.config.expert))


class MoEBesideMLP(MoE):
    """norm(mlp(norm(x))) + norm(experts(norm(x))), routed by a norm of x, too: five gains for one x (Gemma 4).

    x [T, H], the residual stream -> [T, H].
    """

    def __init__(self, size: int, config: MoEConfig, name: str, epsilon: float) -> None:
        super().__init__(size, config, name)
        self.mlp_norm, self.mlp_post_norm = RMSNorm(size, epsilon), RMSNorm(size, epsilon)
        self.mlp = MLP(size, MLPConfig(config.dense_width, config.expert.activation))
        self.router_norm = RMSNorm(size, epsilon)
        self.experts_norm, self.experts_post_norm = RMSNorm(size, epsilon), RMSNorm(size, epsilon)

    def forward(self, x: Tensor, is_image: Tensor | None = None) -> Tensor:  # noqa: ARG002
        dense = self.mlp_post_norm(self.mlp(self.mlp_norm(x)))
        return dense + self.experts_post_norm(self.routed(self.experts_norm(x), self.router_norm(x)))


class MoEOfModality(MoE):
    """Tokens of text have experts and a router of their own, those of images others, in `images` (ERNIE 4.5 VL).

    A token has logits of its own router alone. To either bank a token of the other kind goes to no expert, so that a
    step of text alone reads no weights of the experts for images. The shared expert runs for all.
    """

    def __init__(self, size: int, config: MoEConfig, name: str) -> None:
        super().__init__(size, config, name)
        self.images = ImageExperts(size, replace(config, width=config.image_width, shared_width=0), name)

    def forward(self, x: Tensor, is_image: Tensor | None = None) -> Tensor:
        """is_image: [T, 1] bool."""
        assert is_image is not None
        logits = torch.where(is_image, self.images.router(x), self.router(x))
        logits = ops.tap(logits, f"{self.name}.router_logits")
        (text_index, text_weight), (image_index, image_weight) = self.route(logits), self.images.route(logits)
        index = ops.tap(torch.where(is_image, image_index, text_index), f"{self.name}.expert_index")
        y = self.through(x, torch.where(is_image, -1, index), text_weight)
        y = y + self.images.through(x, torch.where(is_image, index, -1), image_weight)
        return self.with_shared(x, y)


class ImageExperts(MoE):
    """The experts for images of `MoEOfModality`: no token of text is sent to any."""

    @property
    def idle_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
