"""A shipped engine with its inside visible: the same graph and weights, with routing and hidden states as outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx

from moevlm.export.config import ModelConfig
from moevlm.export.parity.wrapped_engine import WrappedEngine
from moevlm.plugins.ops.router import route
from moevlm.runtime.backends.ort.backend import open_graphs, operators_for
from moevlm.runtime.backends.ort.engine import OrtEngine
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.step import Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows


class DebugEngine(WrappedEngine):
    """An engine of a bundle whose steps also say which experts each token went to, and its hidden states.

    A graph that keeps its routers shows `expert_index` itself; where the kernel routes (kernel_routes), the numpy spec
    says what its logits mean.
    """

    def __init__(self, bundle: Bundle, target: str, config: ModelConfig) -> None:
        _, engine = bundle.engine(target)
        self._config = config
        *vision, decoder = open_graphs(bundle, target)
        graph = onnx.load_model_from_string(decoder.data)
        produced = {name for node in graph.graph.node for name in node.output}
        for i in range(len(config.decoder.layers)):
            wanted = [f"layers.{i}.hidden"]
            if i in config.moe_layers:
                index, logits = f"layers.{i}.expert_index", f"layers.{i}.router_logits"
                wanted += [logits, index] if index in produced else [logits]
            for name in wanted:
                dtype = onnx.TensorProto.INT32 if name.endswith("index") else onnx.TensorProto.FLOAT
                graph.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, [None, None]))
        super().__init__(
            OrtEngine(
                next(iter(vision), None),
                replace(decoder, data=graph.SerializeToString()),
                bundle.manifest.model,
                engine,
                operators=operators_for(engine),
            )
        )
        self.kernel_routes = not any(f"layers.{i}.expert_index" in produced for i in config.moe_layers)

    def forward(
        self, step: Step, visual: Sequence[FeatureRows] = (), cancellation: Cancellation | None = None
    ) -> StepOutput:
        output = super().forward(step, visual, cancellation)
        if not self.kernel_routes:
            return output
        chosen = {  # such a kernel has no correction bias, see `LowerMoE`
            f"layers.{i}.expert_index": route(output.outputs[f"layers.{i}.router_logits"], moe.router)[0]
            for i, moe in self._config.moe.items()
        }
        return replace(output, outputs={**output.outputs, **chosen})
