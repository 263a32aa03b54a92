"""The steps that will come, noted by an engine that answers none of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moevlm.export.config import DecoderConfig
from moevlm.export.parity.torch_images import Images
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.step import Candidates, EngineLimits, Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, joined
from moevlm.runtime.request.vision_inputs import VisionInputs

PAGE = 16  # tokens: short prompts have several pages
_ANY = 1 << 20  # sequences, tokens or logits of a step


@dataclass
class NotedStep:
    """A step and what became of it. x: the residual stream, [T, H]. outputs: debug outputs, if they were asked for."""

    step: Step
    visual: HostFeatures
    x: torch.Tensor
    asked: bool = False
    outputs: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class NotedPool:
    """The steps on one pool, in order."""

    pages: int
    rows: int
    steps: list[NotedStep] = field(default_factory=list)


class _Asked(Mapping[str, np.ndarray]):
    """Empty; who looks into it will have the step's debug outputs the second time."""

    def __init__(self, noted: NotedStep) -> None:
        self._noted = noted

    def __iter__(self) -> Iterator[str]:
        self._noted.asked = True
        return iter(())

    def __len__(self) -> int:
        return 0

    def __getitem__(self, name: str) -> np.ndarray:
        raise KeyError(name)


class StepNotes:
    """The first time: an engine that encodes images, and answers steps with logits of no vocabulary."""

    def __init__(self, config: DecoderConfig, images: Images) -> None:
        self._config, self._images = config, images
        self.limits, self.states = limits_of(config), config.states
        self.pools: list[NotedPool] = []

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> HostFeatures:  # noqa: ARG002
        return self._images.encode(inputs)

    def reserve(self, pages: int, rows: int) -> None:
        self.pools.append(NotedPool(pages, rows))

    def forward(
        self,
        step: Step,
        visual: Sequence[FeatureRows] = (),
        cancellation: Cancellation | None = None,  # noqa: ARG002
    ) -> StepOutput:
        none = HostFeatures(
            np.zeros((1, self._config.hidden), np.float32),
            np.zeros((self._config.deepstack, 1, self._config.hidden), np.float32),
        )
        noted = NotedStep(step, joined(visual) if visual else none, torch.empty(0))
        self.pools[-1].steps.append(noted)
        rows = len(step.logits_index)
        logits, ids = np.zeros((rows, 0), np.float32), np.zeros((rows, 0), np.int32)
        return StepOutput(Candidates(logits, ids, np.zeros(rows, np.float32)), logits.__getitem__, _Asked(noted))

    def close(self) -> None:
        """Nothing to do."""


def limits_of(config: DecoderConfig) -> EngineLimits:
    """Those of canonical PyTorch, which takes any step."""
    return EngineLimits(_ANY, _ANY, _ANY, config.context, PAGE)
