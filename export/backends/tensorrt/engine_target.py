"""A TensorRT target: one pair of engines, vision and decoder, and the experts' weights beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import msgspec
import onnx_ir as ir

from moevlm.export.backends.base import BuildContext
from moevlm.export.backends.sizes import Sizes
from moevlm.export.backends.states import kept
from moevlm.export.backends.tensorrt import machine, worker
from moevlm.export.backends.tensorrt.compiled_programs import CompiledPrograms
from moevlm.export.backends.tensorrt.expert_formats import chosen
from moevlm.export.backends.tensorrt.experts_file import add_experts, shared_errors
from moevlm.export.backends.tensorrt.kernels_file import kernels_json
from moevlm.export.backends.tensorrt.lowering import lower, stored_weights
from moevlm.export.backends.tensorrt.onnx_file import write_onnx
from moevlm.export.backends.tensorrt.options import Options
from moevlm.export.backends.tensorrt.passes.plugin import DOMAIN, Programs
from moevlm.export.backends.tensorrt.passes.plugin_moe import expert_weights
from moevlm.export.backends.tensorrt.plan_builder import Built, Job
from moevlm.export.backends.tensorrt.product import NO_FLOAT32_GEMM, Product
from moevlm.export.backends.tensorrt.profiles import (
    Profile,
    decoder_profiles,
    max_pages,
    max_patches,
    max_rows,
    vision_profiles,
)
from moevlm.export.backends.tensorrt.sizes import cost_of, workspace
from moevlm.export.config import ModelConfig
from moevlm.export.formats.stored import recoded, weight_errors
from moevlm.export.graph.cost import cost
from moevlm.export.graph.weights import Weight
from moevlm.export.passes.prune_2_4 import pruned_count
from moevlm.export.writing.bundle_writer import BundleWriter
from moevlm.plugins.gpu.ops.gated_delta import HEAD_DIMS
from moevlm.runtime.backends.libraries import plugin_path
from moevlm.runtime.backends.tensorrt.kernel_resources import KERNELS
from moevlm.runtime.core.engine_metadata import CostMetadata, EngineMetadata, TensorRTMetadata
from moevlm.runtime.core.errors import BuildError, FieldError
from moevlm.runtime.core.states import PAGE_SIZE


@dataclass(frozen=True)
class TensorRTTarget:
    """sms: the kinds of GPUs that its plans are for, 86 for compute capability 8.6."""

    product: Product
    sms: tuple[int, ...]
    options: Options
    sizes: ClassVar[Sizes] = Sizes(delta_dim=HEAD_DIMS[-1])  # TensorRT itself refuses what else it cannot build

    @property
    def name(self) -> str:
        """As in the manifest: rtx:sm86,sm89:bf16-int4."""
        return f"{self.product.kind}:{','.join(f'sm{sm}' for sm in self.sms)}:{self.options.precision}"

    @property
    def folder(self) -> str:
        """Where its plans lie in the bundle."""
        return f"engines/{self.name.replace(':', '-').replace(',', '-')}"

    def path(self, graph: str) -> str:
        """The path inside the bundle of the vision or the decoder engine."""
        return f"{self.folder}/{graph}.plan"

    def require_machine(self) -> None:
        """See `Target`."""
        machine.require(self.name, self.product, self.sms)

    def write(self, build: BuildContext) -> EngineMetadata:
        """Build both engines into the bundle, and the experts' weights unless they are there, or in the existing one.

        A chunk has no more tokens than the model's context. Raises BuildError, and leaves cleaning up to the writer.
        """
        return self._fitted(build.config)._write(build)

    def suited(self, config: ModelConfig, weights: Mapping[str, Weight]) -> Self:
        """See `Target`."""
        banks = [[weights[name] for name in names] for names in config.expert_matrices]
        return replace(self, options=chosen(self.options, banks))

    def planned(self, config: ModelConfig, weights: Mapping[str, Weight], image_patches: int | None) -> EngineMetadata:
        """See `Target`."""
        exact = min(self.sms) > NO_FLOAT32_GEMM
        fitted = self._fitted(config)
        return fitted._metadata(config, image_patches, cost_of(config, weights, fitted.options, exact))

    def rehearse(
        self, canonical: Mapping[str, ir.Model], config: ModelConfig, image_patches: int | None
    ) -> tuple[EngineMetadata, int]:
        """See `Target`. The bytes are those of weights: what TensorRT adds is not known before."""
        graphs = self.lower(canonical, lambda _: b"")
        found, weights = cost(canonical, graphs, config.tower), stored_weights(graphs)
        experts = max((moe.experts for moe in config.moe.values()), default=0)
        dense = found.dense_bytes + found.head_bytes + found.lookup_bytes + found.vision_bytes
        return self._fitted(config)._metadata(config, image_patches, found, weights=weights), dense + (
            found.expert_bytes + found.image_expert_bytes
        ) * experts

    def _fitted(self, config: ModelConfig) -> Self:
        chunk = min(self.options.chunk_tokens, config.decoder.context)
        return replace(self, options=replace(self.options, chunk_tokens=chunk))

    def _metadata(
        self,
        config: ModelConfig,
        image_patches: int | None,
        costs: CostMetadata,
        version: str = "",
        pruned_weights: int = 0,
        weights: Sequence[Weight] = (),
    ) -> EngineMetadata:
        """version: of TensorRT; "" before anything is built. weights: of the lowered graphs.

        The others: as in EngineMetadata.
        """
        o, patches = self.options, _patches(config, image_patches)
        states = kept(config.decoder.states, o.cache_dtype)
        return EngineMetadata(
            vision="" if config.vision is None else self.path("vision"),
            decoder=self.path("decoder"),
            dtype=o.weights or o.activations,
            group_size=o.group if o.weights else 0,
            states=states,
            page_size=PAGE_SIZE,
            sparsity=o.sparsity,
            pruned_weights=pruned_weights,
            recoded=recoded(weights),
            cost=costs,
            tensorrt=TensorRTMetadata(
                product=self.product.module,
                version=version,
                sms=self.sms,
                activations=o.activations,
                experts=o.experts_path if config.moe and not o.native_moe else "",
                max_sequences=o.max_sequences,
                max_tokens=o.max_tokens,
                max_logits=o.max_logits,
                max_visual=o.max_tokens if config.vision else 0,
                max_patches=patches,
                max_pages=max_pages(states),
                max_rows=max_rows(states),
                workspace=workspace(config, o, patches),
                version_compatible=o.version_compatible,
            ),
        )

    def _write(self, build: BuildContext) -> EngineMetadata:
        writer, canonical, config, progress = build.writer, build.canonical, build.config, build.progress
        programs = CompiledPrograms(self.sms, progress)
        graphs = self.lower(canonical, programs.of)
        experts = expert_weights(graphs["decoder"])
        if experts:
            add_experts(build, self.options.experts_path, experts)
        if programs.ops:
            writer.add_bytes(f"{self.folder}/{KERNELS}", kernels_json(programs.ops, self.sms))
        o, columns = self.options, -(-config.decoder.context // PAGE_SIZE)
        states = kept(config.decoder.states, o.cache_dtype)
        profiles = {
            "decoder": decoder_profiles(graphs["decoder"], o, columns, max_pages(states), max_rows(states)),
        }
        if config.vision is not None:
            patches = _patches(config, build.image_patches)
            profiles["vision"] = vision_profiles(graphs["vision"], config.vision.metadata(), patches)
        built = {
            name: self._build(writer, graph, name, profiles[name], partial(progress, f"building {self.name} {name}"))
            for name, graph in graphs.items()
        }
        pruned = sum(map(pruned_count, canonical.values())) if o.sparsity else 0
        found, version = cost(canonical, graphs, config.tower), built["decoder"].version
        weights = stored_weights(graphs)
        known = weight_errors(weights) | shared_errors(o.experts_path, build.engines.values())
        made = self._metadata(config, build.image_patches, found, version, pruned, weights)
        errors = {fate: error for fate, error in known.items() if fate in made.recoded}
        return msgspec.structs.replace(made, weight_errors=errors)

    def lower(self, canonical: Mapping[str, ir.Model], programs: Programs) -> dict[str, ir.Model]:
        """See `lowering.lower`. Raises BuildError for a size that a kernel does not take."""
        try:
            return lower(canonical, self.options, self.sms, programs)
        except FieldError as error:
            raise BuildError(f"{self.name} cannot run this model: {error}") from error

    def _build(
        self, writer: BundleWriter, graph: ir.Model, name: str, profiles: list[Profile], progress: Callable
    ) -> Built:
        flags = ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME") if self.options.version_compatible else ()
        plugins = [node for node in graph.graph if node.domain == DOMAIN]

        def build(plan: Path, scratch: Path) -> Built:
            progress(0, 0)
            onnx = scratch / f"{name}.onnx"
            write_onnx(graph, onnx)
            job = Job(
                product=self.product.module,
                onnx=str(onnx),
                plan=str(plan),
                sms=self.sms,
                profiles=profiles,
                links=str(scratch),
                plugins=str(plugin_path()) if plugins else "",
                plugin_layers=len(plugins),
                flags=(*flags, *(("SPARSE_WEIGHTS",) if self.options.sparsity else ())),
            )
            return worker.run(job, progress)

        return writer.add_built(self.path(name), build)


def _patches(config: ModelConfig, image_patches: int | None) -> int:
    """Of a call for images; 0 for a model of text alone."""
    return 0 if config.vision is None else max_patches(config.vision.metadata().unit, image_patches)
