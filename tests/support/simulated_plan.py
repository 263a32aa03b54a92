"""The graphs that TensorRT is given as an engine, run in onnx's reference evaluator: what rounding alone costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moevlm.export.backends.tensorrt.options import PlanOptions
from moevlm.export.backends.tensorrt.product import RTX
from moevlm.export.backends.tensorrt.target import PlanTarget
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.protocol import Step, VisionInputs, VisualFeatures
from tests.support.plan_graphs import Evaluator, named


def lowered(canonical: Mapping[str, ir.Model], options: PlanOptions, sm: int = 89) -> dict[str, ir.Model]:
    """The graphs of an rtx target, the numpy spec in the place of compiled programs."""
    return PlanTarget(RTX, (sm,), options).lower(canonical, named)


@dataclass
class SimulatedCache:
    """arrays: keys and values by the names of the graph's inputs."""

    batch: int
    capacity: int
    arrays: dict[str, np.ndarray]


class SimulatedPlan:
    """The engine protocol on lowered graphs, for caches of `capacity` tokens. experts: their weights, by name."""

    def __init__(self, graphs: Mapping[str, ir.Model], model: ModelMetadata, capacity: int) -> None:
        self._vision, self._decoder = Evaluator(graphs["vision"]), Evaluator(graphs["decoder"])
        self._model, self._capacity = model, capacity
        self.experts = self._decoder.experts

    def encode(self, inputs: VisionInputs, *_: object) -> VisualFeatures:
        found = self._vision.run(dict(vars(inputs)))
        embeds = found["visual_embeds"]
        return VisualFeatures(embeds, found.get("deepstack_embeds", np.zeros((0, *embeds.shape), np.float32)))

    def new_cache(self, batch: int, capacity: int) -> SimulatedCache:
        arrays = {
            name: np.zeros((batch, layer.kv_heads, self._capacity, width), np.float32)
            for i, layer in enumerate(self._model.layers)
            for name, width in ((f"key_cache.{i}", layer.key_dim), (f"value_cache.{i}", layer.value_dim))
        }
        return SimulatedCache(batch, capacity, arrays)

    def forward(self, step: Step, visual: VisualFeatures | None, cache: SimulatedCache, *_: object) -> np.ndarray:
        model = self._model
        if visual is None:
            zeros = np.zeros((1, model.hidden), np.float32)
            visual = VisualFeatures(zeros, np.zeros((model.vision.deepstack, *zeros.shape), np.float32))
        features = {"visual_embeds": visual.embeds, "deepstack_embeds": visual.deepstack}
        found = self._decoder.run(dict(vars(step)) | features | cache.arrays)
        cache.arrays = {name: found[name.replace("_cache.", "_cache_out.")] for name in cache.arrays}
        return found["logits"]

    def close(self) -> None:
        """Nothing to do."""
