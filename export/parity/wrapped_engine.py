"""An engine that does what another one does; of use for those that watch or change one part of that."""

from __future__ import annotations

from collections.abc import Sequence

from moevlm.runtime.core.states import StateSpec
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.step import EngineLimits, Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, VisualFeatures
from moevlm.runtime.request.vision_inputs import VisionInputs


class WrappedEngine:
    """See `runtime.engine.protocol.Engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def limits(self) -> EngineLimits:
        return self._engine.limits

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return self._engine.states

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> VisualFeatures:
        return self._engine.encode(inputs, cancellation)

    def reserve(self, pages: int, rows: int) -> None:
        self._engine.reserve(pages, rows)

    def forward(
        self, step: Step, visual: Sequence[FeatureRows] = (), cancellation: Cancellation | None = None
    ) -> StepOutput:
        return self._engine.forward(step, visual, cancellation)

    def close(self) -> None:
        self._engine.close()
