"""The graphs that TensorRT is given as an engine, run in onnx's reference evaluator: what rounding alone costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from moevlm.export.backends.states import kept
from moevlm.export.backends.tensorrt.engine_target import TensorRTTarget
from moevlm.export.backends.tensorrt.options import Options
from moevlm.export.backends.tensorrt.product import RTX
from moevlm.runtime.core.engine_metadata import EngineMetadata, TensorRTMetadata
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS
from moevlm.runtime.core.states import PAGE_SIZE, StateSpec
from moevlm.runtime.engine.protocol import check_step
from moevlm.runtime.engine.step import Candidates, EngineLimits, Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, joined
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.plan_graphs import Evaluator
from tests.support.plugin_nodes import named

CONTEXT = 192


def lowered(canonical: Mapping[str, ir.Model], options: Options, sm: int = 89) -> dict[str, ir.Model]:
    """The graphs of an rtx target, the numpy spec in the place of compiled programs."""
    return TensorRTTarget(RTX, (sm,), options).lower(canonical, named)


class SimulatedPlan:
    """The engine protocol on lowered graphs. experts: their weights, by name."""

    def __init__(
        self, graphs: Mapping[str, ir.Model], model: ModelMetadata, states: tuple[StateSpec, ...], options: Options
    ) -> None:
        """states: of the model. options: what the graphs were lowered with."""
        self._vision, self._decoder = Evaluator(graphs["vision"]), Evaluator(graphs["decoder"])
        self._model, self.states = model, kept(states, options.cache_dtype)
        # What the manifest says as far as limits depend on it.
        self.metadata = EngineMetadata(
            vision="",
            decoder="",
            dtype="",
            states=self.states,
            tensorrt=TensorRTMetadata(
                product="tensorrt_rtx",
                version="",
                sms=(89,),
                activations=options.activations,
                experts="",
                max_sequences=options.max_sequences,
                max_tokens=options.max_tokens,
                max_logits=options.max_logits,
                max_visual=1,
                max_patches=1,
                max_pages=2,
            ),
        )
        self.limits = EngineLimits(
            options.max_sequences, options.max_tokens, options.max_tokens, CONTEXT, PAGE_SIZE, packed=True
        )
        self.experts = self._decoder.experts

    def encode(self, inputs: VisionInputs, *_: object) -> HostFeatures:
        found = self._vision.run(inputs.arrays)
        embeds = found["visual_embeds"]
        return HostFeatures(embeds, found.get("deepstack_embeds", np.zeros((0, *embeds.shape), np.float32)))

    def reserve(self, pages: int, rows: int) -> None:
        self.pages, self.rows = pages, rows
        self._caches = self._decoder.caches(pages)

    def forward(self, step: Step, visual: Sequence[FeatureRows] = (), *_: object) -> StepOutput:
        model = self._model
        check_step(step, visual, self.limits, model, self.pages, 0)
        zeros = np.zeros((1, model.hidden), np.float32)
        seen = HostFeatures(zeros, np.zeros((model.vision.deepstack, *zeros.shape), np.float32))
        if visual:
            seen = joined(visual)
        cos = {f"rope_cos.{group}": tables[0] for group, tables in step.rope.items()}
        sin = {f"rope_sin.{group}": tables[1] for group, tables in step.rope.items()}
        features = {"visual_embeds": seen.embeds, "deepstack_embeds": seen.deepstack}
        found = self._decoder.run(vars(step) | cos | sin | features | self._caches)
        return StepOutput(Candidates(*(found[name] for name in CANDIDATE_OUTPUTS)), found["logits"].__getitem__)

    def close(self) -> None:
        """Nothing to do."""
