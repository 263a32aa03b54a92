"""Heads of the gated delta rule, as its kernels are specialised to them."""

from dataclasses import dataclass
from typing import Self

from moevlm.plugins.gpu.draft import power_of_two
from moevlm.plugins.ops.spec import GatedDeltaSpec


@dataclass(frozen=True)
class DeltaHeads:
    """group: value heads of a key head. channels: of the convolution. row: values in a row of the op's input, `beside`
    of them another's. key_width, value_width, head_width: what a key, a value or either is padded to.
    """

    key_heads: int
    value_heads: int
    group: int
    key_dim: int
    value_dim: int
    channels: int
    row: int
    key_width: int
    value_width: int
    head_width: int
    kernel: int
    scale: float
    epsilon: float

    @classmethod
    def of(cls, spec: GatedDeltaSpec, beside: int) -> Self:
        """What follows from the attributes of the op."""
        key_width, value_width = (max(16, power_of_two(dim)) for dim in (spec.key_dim, spec.value_dim))
        return cls(
            key_heads=spec.key_heads,
            value_heads=spec.value_heads,
            group=spec.value_heads // spec.key_heads,
            key_dim=spec.key_dim,
            value_dim=spec.value_dim,
            channels=spec.channels,
            row=spec.channels + 2 * spec.value_heads + beside,
            key_width=key_width,
            value_width=value_width,
            head_width=max(key_width, value_width),
            kernel=spec.kernel,
            scale=spec.scale or spec.key_dim**-0.5,
            epsilon=spec.epsilon,
        )
