"""A target that is ONNX graphs with their weights beside them, for ONNX Runtime."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import onnx_ir as ir

from moevlm.export.backends.base import BuildContext
from moevlm.export.backends.sizes import ANY_SIZE, Sizes
from moevlm.export.backends.states import kept
from moevlm.export.config import ModelConfig
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.sparsity import TWO_OF_FOUR
from moevlm.export.formats.stored import recoded, weight_errors, weights_of
from moevlm.export.graph.cost import cost
from moevlm.export.graph.weights import Weight
from moevlm.export.passes.base import Pass, run
from moevlm.export.passes.prune_2_4 import PruneTwoOfFour, pruned_count
from moevlm.export.writing.model_file import data_bytes, plan
from moevlm.runtime.core.engine_metadata import CostMetadata, EngineMetadata

# Neither is what decoding waits for, so they get the bits that cost no accuracy.
EMBEDDING = IntFormat(8, 32)
VISION = IntFormat(8, 32)


@dataclass(frozen=True)
class OnnxTarget:
    """name: as given to --target. folder: where its graphs lie in the bundle. dtype: of most weights.

    group_size: weights that share a scale, 0 if they are not quantized. kv_cache: dtype of the KV cache.
    passes: what lowers each of the canonical graphs. operators: domain of those that ONNX Runtime must be given.
    sparsity: "2:4" if the passes prune the dense layers, else "". sizes: that its kernels take.
    page_size, row_independent: as in EngineMetadata.
    """

    name: str
    folder: str
    dtype: str
    group_size: int
    kv_cache: str
    passes: Mapping[str, tuple[Pass, ...]]
    operators: str = ""
    sparsity: str = ""
    sizes: Sizes = ANY_SIZE
    page_size: int = 0
    row_independent: bool = False

    def pruned(self) -> Self:
        """This target from weights of which two of every four were set to zero first."""
        passes = {graph: (PruneTwoOfFour(), *passes) for graph, passes in self.passes.items()}
        return replace(self, sparsity=TWO_OF_FOUR, passes=passes)

    def metadata(
        self,
        cost: CostMetadata,
        canonical: Mapping[str, ir.Model],
        lowered: Mapping[str, ir.Model],
        config: ModelConfig,
    ) -> EngineMetadata:
        """What the manifest says of this engine. canonical, lowered: the graphs that it was made of, and is."""
        weights = [weight for graph in lowered.values() for weight in weights_of(graph)]
        return EngineMetadata(
            vision="" if config.vision is None else self.path("vision"),
            decoder=self.path("decoder"),
            dtype=self.dtype,
            group_size=self.group_size,
            page_size=self.page_size,
            row_independent=self.row_independent,
            states=kept(config.decoder.states, self.kv_cache),
            operators=self.operators,
            sparsity=self.sparsity,
            pruned_weights=sum(map(pruned_count, canonical.values())) if self.sparsity else 0,
            recoded=recoded(weights),
            weight_errors=weight_errors(weights),
            cost=cost,
        )

    def require_machine(self) -> None:
        """As `Target.require_machine`: any machine will do."""

    def suited(self, config: ModelConfig, weights: Mapping[str, Weight]) -> Self:  # noqa: ARG002
        """As `Target.suited`: its passes keep what codes they can, weight by weight."""
        return self

    def planned(self, config: ModelConfig, weights: Mapping[str, Weight], image_patches: int | None) -> None:
        """As `Target.planned`: the host's memory grows with what is used."""

    def rehearse(
        self,
        canonical: Mapping[str, ir.Model],
        config: ModelConfig,
        image_patches: int | None,  # noqa: ARG002 - memory is taken as it is needed
    ) -> tuple[EngineMetadata, int]:
        """As `Target.rehearse`."""
        lowered = {name: self.lower(graph, name) for name, graph in canonical.items()}
        found = cost(canonical, lowered, config.tower)
        return self.metadata(found, canonical, lowered, config), sum(
            data_bytes(plan(graph)) for graph in lowered.values()
        )

    def write(self, build: BuildContext) -> EngineMetadata:
        """As `Target.write`."""
        lowered = {name: self.lower(graph, name) for name, graph in build.canonical.items()}
        for name, graph in lowered.items():
            build.writer.add_model(graph, self.path(name), partial(build.progress, f"writing {self.name} {name}"))
        found = cost(build.canonical, lowered, build.config.tower)
        return self.metadata(found, build.canonical, lowered, build.config)

    def path(self, graph: str) -> str:
        """The path inside the bundle of the vision or the decoder graph."""
        return f"{self.folder}/{graph}.onnx"

    def lower(self, canonical: ir.Model, graph: str) -> ir.Model:
        """The vision or the decoder graph that this target runs; the canonical one stays, the weights are shared."""
        model = canonical.clone()
        run(self.passes[graph], model)
        return model
