"""The graphs that TensorRT is given as an engine, run in onnx's reference evaluator: what rounding alone costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from moevlm.export.backends.tensorrt.engine_target import TensorRTTarget
from moevlm.export.backends.tensorrt.options import Options
from moevlm.export.backends.tensorrt.product import RTX
from moevlm.runtime.backends.tensorrt.decoder import plan_arrays
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.names import CANDIDATES
from moevlm.runtime.core.states import PagedKV, StateSpec, output_name
from moevlm.runtime.engine.candidates import candidates_of
from moevlm.runtime.engine.protocol import check_step
from moevlm.runtime.engine.step import EngineLimits, Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, joined
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.plan_graphs import Evaluator, named


def lowered(canonical: Mapping[str, ir.Model], options: Options, sm: int = 89) -> dict[str, ir.Model]:
    """The graphs of an rtx target, the numpy spec in the place of compiled programs."""
    return TensorRTTarget(RTX, (sm,), options).lower(canonical, named)


class SimulatedPlan:
    """The engine protocol on lowered graphs, for sequences of `capacity` tokens. experts: their weights, by name."""

    def __init__(
        self, graphs: Mapping[str, ir.Model], model: ModelMetadata, states: tuple[StateSpec, ...], capacity: int
    ) -> None:
        self._vision, self._decoder = Evaluator(graphs["vision"]), Evaluator(graphs["decoder"])
        self._model, self.states = model, states
        self.limits = EngineLimits(1, capacity, capacity, capacity, capacity)
        self.experts = self._decoder.experts

    def encode(self, inputs: VisionInputs, *_: object) -> HostFeatures:
        found = self._vision.run(dict(vars(inputs)))
        embeds = found["visual_embeds"]
        return HostFeatures(embeds, found.get("deepstack_embeds", np.zeros((0, *embeds.shape), np.float32)))

    def reserve(self, pages: int, rows: int) -> None:
        self.pages, self.rows = pages, rows
        self._caches = [self._page() for _ in range(pages)]

    def _page(self) -> dict[str, np.ndarray]:
        """Keys and values of a sequence by the names of the graph's inputs."""
        return {
            name: np.zeros((1, state.kv_heads, self.limits.page_size, width), np.float32)
            for state in self.states
            if isinstance(state, PagedKV)
            for name, width in state.widths.items()
        }

    def forward(self, step: Step, visual: Sequence[FeatureRows] = (), *_: object) -> StepOutput:
        model, page = self._model, int(step.page_table[0, 0])
        check_step(step, visual, self.limits, model.vocabulary, self.pages, 0)
        zeros = np.zeros((1, model.hidden), np.float32)
        seen = HostFeatures(zeros, np.zeros((model.vision.deepstack, *zeros.shape), np.float32))
        if visual:
            seen = joined(visual)
        features = {"visual_embeds": seen.embeds, "deepstack_embeds": seen.deepstack}
        found = self._decoder.run(plan_arrays(step) | features | self._caches[page])
        self._caches[page] = {name: found[output_name(name)] for name in self._caches[page]}
        logits = found["logits"]
        return StepOutput(candidates_of(logits, CANDIDATES), logits.__getitem__)

    def close(self) -> None:
        """Nothing to do."""
