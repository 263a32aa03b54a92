"""The recurrent mixer: a gate on the outcome of a recurrence, between two projections."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moevlm.export.config import MixerConfig
from moevlm.export.modules.mixers import States, StepTensors, register
from moevlm.plugins.ops.spec import attributes
from moevlm.runtime.core.states import Recurrent, StateSpec
from tests.support.hybrid.recurrence import RecurrenceSpec, gated_recurrence


@dataclass(frozen=True)
class RecurrenceConfig(MixerConfig):
    """channels: of the recurrence."""

    channels: int

    def states(self, layer: int) -> tuple[StateSpec, ...]:
        return (Recurrent(layer=layer, name="recurrence", shape=(self.channels,)),)


@register(RecurrenceConfig)
class GatedRecurrence(nn.Module):
    """out(recurrence(inner(x)) * silu(gate(x)))"""

    def __init__(self, size: int, config: RecurrenceConfig, _: float) -> None:
        super().__init__()
        self.spec = RecurrenceSpec(config.channels)
        self.inner = nn.Linear(size, config.channels, bias=False)
        self.gate = nn.Linear(size, config.channels, bias=False)
        self.out = nn.Linear(config.channels, size, bias=False)
        self.decay = nn.Parameter(torch.empty(config.channels))

    def forward(self, x: Tensor, step: StepTensors, states: States) -> tuple[Tensor, States]:
        y, state = gated_recurrence(
            self.inner(x), self.decay, *states, step.query_start, step.state_row, **attributes(self.spec)
        )
        return self.out(y * nn.functional.silu(self.gate(x))), (state,)
