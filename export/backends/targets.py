"""What each target makes of the canonical graphs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx_ir as ir

from moevlm.export.backends.cpu.passes.attention import CpuAttention
from moevlm.export.backends.cpu.passes.candidates import CpuCandidates
from moevlm.export.backends.cpu.passes.linear import CpuFloatLinear, CpuLinear
from moevlm.export.backends.cpu.passes.moe import CpuMoE
from moevlm.export.backends.ort.passes.lower_attention import LowerAttention
from moevlm.export.backends.ort.passes.lower_moe import LowerMoE
from moevlm.export.backends.ort.passes.lower_segment_attention import LowerSegmentAttention
from moevlm.export.backends.sizes import ANY_SIZE, Sizes
from moevlm.export.backends.states import kept
from moevlm.export.backends.tensorrt.names import plan_targets
from moevlm.export.backends.tensorrt.options import PlanOptions
from moevlm.export.backends.tensorrt.target import PlanTarget
from moevlm.export.config import ModelConfig
from moevlm.export.formats.integers import SMALLEST_GROUP, IntFormat
from moevlm.export.formats.registry import GROUP_SIZES, INTEGERS, int_format
from moevlm.export.formats.sparsity import SPARSITIES
from moevlm.export.graph.cost import cost
from moevlm.export.passes.base import Pass, run
from moevlm.export.passes.fuse_skip_norm import FuseSkipNorm
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.export.passes.prune_2_4 import PruneTwoOfFour, pruned_count
from moevlm.export.passes.quantize_embedding import QuantizeEmbedding
from moevlm.export.passes.quantize_experts import QuantizeExperts
from moevlm.export.passes.quantize_linear import QuantizeLinear
from moevlm.export.writing.bundle_writer import BundleWriter
from moevlm.plugins.cpu import limits as cpu_limits
from moevlm.runtime.backends.libraries import DOMAIN as CPU
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.manifest import CostMetadata, EngineMetadata
from moevlm.runtime.core.states import PAGE_SIZE

REFERENCE = "reference"
GRAPHS = ("vision", "decoder")
KV_CACHES = ("float32", "int8")
# Neither is what decoding waits for, so they get the bits that cost no accuracy.
EMBEDDING = IntFormat(8, 32)
VISION = IntFormat(8, 32)
# GroupQueryAttention reads heads in vectors of 8; QMoE has no group smaller than 16.
_ORT_SIZES = Sizes(head_dim_multiple=8)
_ORT_QUANTIZED_SIZES = replace(_ORT_SIZES, expert_multiple=SMALLEST_GROUP)
_CPU_SIZES = Sizes(
    heads=cpu_limits.HEADS,
    key_dim=cpu_limits.KEY_DIM,
    value_dim=cpu_limits.VALUE_DIM,
    head_dim_multiple=2,
    experts=cpu_limits.EXPERTS,
)


@dataclass(frozen=True)
class Target:
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

    def pruned(self, sparsity: str) -> "Target":
        """This target from weights that were pruned first. Raises BuildError for the reference."""
        if self.name == REFERENCE:
            raise BuildError(f"{REFERENCE} is the checkpoint itself and stays dense (--sparsity is for other targets)")
        passes = {graph: (PruneTwoOfFour(), *passes) for graph, passes in self.passes.items()}
        return replace(self, sparsity=sparsity, passes=passes)

    def metadata(self, cost: CostMetadata, canonical: Mapping[str, ir.Model], config: ModelConfig) -> EngineMetadata:
        """What the manifest says of this engine. canonical: the graphs that it was made of, by name."""
        vision, decoder = (self.path(graph) for graph in GRAPHS)
        return EngineMetadata(
            vision=vision,
            decoder=decoder,
            dtype=self.dtype,
            group_size=self.group_size,
            page_size=self.page_size,
            row_independent=self.row_independent,
            states=kept(config.decoder.states, self.kv_cache),
            operators=self.operators,
            sparsity=self.sparsity,
            pruned_weights=sum(map(pruned_count, canonical.values())) if self.sparsity else 0,
            cost=cost,
        )

    def write(
        self,
        writer: BundleWriter,
        canonical: Mapping[str, ir.Model],
        config: ModelConfig,
        progress: Callable[[str, int, int], None],
        existing: Bundle | None = None,  # noqa: ARG002 - nothing of it is of use here
    ) -> EngineMetadata:
        """Add its graphs to a bundle. canonical: by name."""
        lowered = {name: self.lower(canonical[name], name) for name in GRAPHS}
        for name, graph in lowered.items():
            writer.add_model(graph, self.path(name), partial(progress, f"writing {self.name} {name}"))
        return self.metadata(cost(canonical, lowered, config.vision.merge_size), canonical, config)

    def path(self, graph: str) -> str:
        """The path inside the bundle of the vision or the decoder graph."""
        return f"{self.folder}/{graph}.onnx"

    def lower(self, canonical: ir.Model, graph: str) -> ir.Model:
        """The vision or the decoder graph that this target runs; the canonical one stays, the weights are shared."""
        model = canonical.clone()
        run(self.passes[graph], model)
        return model


def _ort_cpu(scheme: IntFormat | None) -> dict[str, tuple[Pass, ...]]:
    """To ONNX Runtime's CPU kernels. scheme: of the decoder's weights, None for float32."""
    vision = (QuantizeLinear(VISION),) if scheme else ()
    linear = (QuantizeLinear(scheme), QuantizeEmbedding(EMBEDDING)) if scheme else ()
    experts = (QuantizeExperts(scheme),) if scheme else ()
    return {
        "vision": (*vision, LowerSegmentAttention(), FuseSkipNorm()),
        "decoder": (PackProjections(), *linear, LowerAttention(), FuseSkipNorm(), LowerMoE(), *experts),
    }


def _cpu(scheme: IntFormat, kv_cache: str) -> dict[str, tuple[Pass, ...]]:
    """To moevlm's own CPU kernels, in ONNX Runtime."""
    linear = (PackProjections(), CpuLinear(scheme), QuantizeEmbedding(EMBEDDING))
    attention = CpuAttention(kv_cache == "int8")
    return {
        "vision": (CpuLinear(VISION), LowerSegmentAttention(), FuseSkipNorm()),
        "decoder": (*linear, CpuFloatLinear(), attention, CpuMoE(scheme), FuseSkipNorm(), CpuCandidates()),
    }


def _all(group_size: int, kv_cache: str) -> Iterator[Target]:
    # The reference engine is the canonical graphs themselves, with their weights.
    yield Target(REFERENCE, "graphs", "float32", 0, "float32", {name: () for name in GRAPHS}, page_size=PAGE_SIZE)
    yield Target("ort-cpu", "engines/ort-cpu", "float32", 0, "float32", _ort_cpu(None), sizes=_ORT_SIZES)
    for dtype in INTEGERS:
        scheme = int_format(dtype, group_size)
        cpu: dict[str, Any] = {"sizes": _CPU_SIZES, "page_size": PAGE_SIZE, "row_independent": True}
        folder, passes, sizes = f"engines/ort-cpu-{dtype}", _ort_cpu(scheme), _ORT_QUANTIZED_SIZES
        yield Target(f"ort-cpu:{dtype}", folder, dtype, group_size, "float32", passes, sizes=sizes)
        folder, passes = f"engines/cpu-{dtype}", _cpu(scheme, kv_cache)
        yield Target(f"cpu:{dtype}", folder, dtype, group_size, kv_cache, passes, CPU, **cpu)


PLANS = ("rtx:smNN,...", "trt:smNN")
TARGETS = (*(target.name for target in _all(defaults.GROUP_SIZE, defaults.KV_CACHE)), *PLANS)


def targets(
    names: Iterable[str],
    group_size: int = defaults.GROUP_SIZE,
    kv_cache: str = defaults.KV_CACHE,
    sparsity: str = "",
    plans: PlanOptions | None = None,
) -> tuple[Target | PlanTarget, ...]:
    """The targets of these names, each once; ort-cpu:fp32 is ort-cpu, and trt:sm80,sm90 are two.

    group_size: weights that share a scale where they are quantized. kv_cache: dtype of the cache, of cpu targets.
    sparsity: "2:4" to prune the dense layers, or "". plans: of rtx and trt targets, but for group_size and sparsity.
    Raises BuildError for a name or a value that there is not, or a target that cannot be built on this machine.
    """
    for name, value, allowed in (("group size", group_size, GROUP_SIZES), ("KV cache", kv_cache, KV_CACHES)):
        if value not in allowed:
            raise BuildError(f"unsupported {name} {value} (supported: {', '.join(map(str, allowed))})")
    if sparsity and sparsity not in SPARSITIES:
        raise BuildError(f"unsupported sparsity {sparsity} (supported: {', '.join(SPARSITIES)})")
    plans = replace(plans or PlanOptions(), group_size=group_size, sparsity=sparsity)
    known = {target.name: target for target in _all(group_size, kv_cache)}
    chosen: dict[str, Target | PlanTarget] = {}
    for name in names:
        built: tuple[Target | PlanTarget, ...] = plan_targets(name, plans)
        if not built:
            name = name.removesuffix(":fp32")
            if name not in known:
                raise BuildError(f'unknown target "{name}" (allowed: {", ".join((*known, *PLANS))})')
            built = (known[name].pruned(sparsity) if sparsity else known[name],)
        chosen |= {target.name: target for target in built}
    return tuple(chosen.values())
