"""From the canonical graphs to those that TensorRT is given."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from moevlm.export.backends.tensorrt.options import Options
from moevlm.export.backends.tensorrt.passes.native_moe import NativeMoE
from moevlm.export.backends.tensorrt.passes.pack_delta import PackDelta
from moevlm.export.backends.tensorrt.passes.plugin import Programs
from moevlm.export.backends.tensorrt.passes.plugin_attention import (
    PluginCrossAttention,
    PluginPagedAttention,
    PluginSegmentAttention,
)
from moevlm.export.backends.tensorrt.passes.plugin_candidates import PluginCandidates
from moevlm.export.backends.tensorrt.passes.plugin_gated_delta import PluginGatedDelta
from moevlm.export.backends.tensorrt.passes.plugin_moe import PluginMoE, expert_weights
from moevlm.export.backends.tensorrt.passes.row_sums import RowSums
from moevlm.export.backends.tensorrt.passes.typed import Typed
from moevlm.export.backends.tensorrt.product import NO_FLOAT32_GEMM
from moevlm.export.formats.stored import weights_of
from moevlm.export.graph.cross_attention import CROSS_ATTENTION
from moevlm.export.graph.paged_attention import PAGED_ATTENTION
from moevlm.export.graph.segment_attention import SEGMENT_ATTENTION
from moevlm.export.graph.weights import Weight
from moevlm.export.passes.base import Pass, run
from moevlm.export.passes.lower_head_linear import LowerHeadLinear
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.export.passes.prune_2_4 import PruneTwoOfFour


def lower(
    canonical: Mapping[str, ir.Model], options: Options, sms: Sequence[int], programs: Programs
) -> dict[str, ir.Model]:
    """The graphs that TensorRT is given, by name; the canonical ones stay, the weights are shared.

    sms: the GPUs of the engine. programs: compiles an op, see `plugins.gpu.program`. Raises FieldError for a size that
    a kernel does not take.
    """
    graphs = {name: graph.clone() for name, graph in canonical.items()}
    o = options
    pruned: tuple[Pass, ...] = (PruneTwoOfFour(),) if o.sparsity else ()
    native: tuple[Pass, ...] = (NativeMoE(),) if o.native_moe else ()
    typed = Typed(o.activations, exact_router=min(sms) > NO_FLOAT32_GEMM)
    packed = PackProjections(PAGED_ATTENTION, SEGMENT_ATTENTION, CROSS_ATTENTION)
    first = (*pruned, packed, PackDelta(), LowerHeadLinear(), typed)
    attention = PluginPagedAttention(o.activations, o.cache, programs)
    moe = (*native, PluginMoE(o.activations, o.weights, o.group, programs))
    if "vision" in graphs:
        images = (plugin(o.activations, programs) for plugin in (PluginSegmentAttention, PluginCrossAttention))
        run((*first, *images), graphs["vision"])
    delta = PluginGatedDelta(o.activations, programs)
    run((*first, RowSums(), attention, delta, *moe, PluginCandidates(programs)), graphs["decoder"])
    return graphs


def stored_weights(graphs: Mapping[str, ir.Model]) -> list[Weight]:
    """All weights of lowered graphs: their initializers, and the experts."""
    inside = [weight for graph in graphs.values() for weight in weights_of(graph)]
    return [*inside, *expert_weights(graphs["decoder"]).values()]
