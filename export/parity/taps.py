"""A shipped engine with its inside visible: the same graph and weights, with routing and hidden states as outputs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import onnx

from moevlm.export.config import ModelConfig
from moevlm.plugins.ops import reference
from moevlm.runtime.backends.ort.engine import OrtEngine
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Cache, Engine, Step, VisionInputs, VisualFeatures
from moevlm.runtime.loading import open_graphs, operators_for


class Tapped(Engine, Protocol):
    """An engine that shows values from the inside of its last forward, by name, rows [B * S, ...].

    kernel_routes: it does not show its choice of experts, only the logits that it chose from.
    """

    @property
    def taps(self) -> Mapping[str, np.ndarray]: ...
    @property
    def kernel_routes(self) -> bool: ...


class TappedEngine:
    """An engine of a bundle that also records which experts each token went to, and its hidden states.

    taps: of the last forward, by name as in the graph, rows [B * S, ...]. A graph that keeps its routers shows
    `expert_index` itself; where the kernel routes (kernel_routes), the numpy spec says what its logits mean.
    """

    def __init__(self, bundle: Bundle, target: str, config: ModelConfig) -> None:
        _, engine = bundle.engine(target)
        self._config = config
        vision, decoder = open_graphs(bundle, target)
        graph = onnx.load_model_from_string(decoder.data)
        produced = {name for node in graph.graph.node for name in node.output}
        for i in range(len(config.decoder.feed_forward)):
            wanted = [f"layers.{i}.hidden"]
            if i in config.moe_layers:
                index, logits = f"layers.{i}.expert_index", f"layers.{i}.router_logits"
                wanted += [logits, index] if index in produced else [logits]
            for name in wanted:
                dtype = onnx.TensorProto.INT32 if name.endswith("index") else onnx.TensorProto.FLOAT
                graph.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, [None, None]))
        self._engine = OrtEngine(
            vision,
            replace(decoder, data=graph.SerializeToString()),
            bundle.manifest.model,
            engine,
            operators=operators_for(engine),
        )
        self.taps: dict[str, np.ndarray] = {}
        self.kernel_routes = not any(f"layers.{i}.expert_index" in produced for i in config.moe_layers)

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> VisualFeatures:
        return self._engine.encode(inputs, cancellation)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self._engine.new_cache(batch, capacity)

    def forward(
        self, step: Step, visual: VisualFeatures | None, cache: Any, cancellation: Cancellation | None = None
    ) -> np.ndarray:
        self.taps = self._engine.run(step, visual, cache, cancellation)
        for i in self._config.moe_layers:
            logits = self.taps[f"layers.{i}.router_logits"]
            if self.kernel_routes:  # it has no correction bias, see `LowerMoE`
                self.taps[f"layers.{i}.expert_index"] = reference.route(logits, self._config.moe[i].router)[0]
        return self.taps["logits"]

    def close(self) -> None:
        self._engine.close()
