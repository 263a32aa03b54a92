"""The targets of ONNX Runtime as it comes: the canonical graphs themselves, and what its CPU kernels make of them."""

from dataclasses import replace

from moevlm.export.backends.base import GRAPHS, Target
from moevlm.export.backends.onnx_target import EMBEDDING, VISION, OnnxTarget
from moevlm.export.backends.ort.options import Options
from moevlm.export.backends.ort.passes.lower_attention import LowerAttention
from moevlm.export.backends.ort.passes.lower_gated_delta import LowerGatedDelta
from moevlm.export.backends.ort.passes.lower_moe import LowerMoE
from moevlm.export.backends.ort.passes.lower_segment_attention import LowerSegmentAttention
from moevlm.export.backends.ort.passes.quantize_experts import QuantizeExperts
from moevlm.export.backends.sizes import Sizes
from moevlm.export.formats.integers import SMALLEST_GROUP, IntFormat
from moevlm.export.formats.registry import INTEGERS, int_format
from moevlm.export.passes.base import Pass
from moevlm.export.passes.fuse_skip_norm import FuseSkipNorm
from moevlm.export.passes.lower_head_linear import LowerHeadLinear
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.export.passes.quantize_embedding import QuantizeEmbedding
from moevlm.export.passes.quantize_linear import QuantizeLinear
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.states import PAGE_SIZE

# GroupQueryAttention reads heads in vectors of 8; QMoE has no group smaller than 16.
_SIZES = Sizes(head_dim_multiple=8)
_QUANTIZED_SIZES = replace(_SIZES, expert_multiple=SMALLEST_GROUP)
# The canonical graphs themselves, with their weights.
REFERENCE = OnnxTarget(
    "reference", "graphs", "float32", 0, "float32", {name: () for name in GRAPHS}, page_size=PAGE_SIZE
)


def targets(name: str, options: Options) -> tuple[Target, ...]:
    """The target of this name; ort-cpu:fp32 is ort-cpu. Raises BuildError for a reference from pruned weights."""
    kind, _, dtype = name.partition(":")
    if name == REFERENCE.name:
        if options.sparsity:
            raise BuildError(f"{name} is the checkpoint itself and stays dense (--sparsity is for other targets)")
        return (REFERENCE,)
    if kind != "ort-cpu" or dtype not in ("", "fp32", *INTEGERS):
        return ()
    if dtype in INTEGERS:
        scheme = int_format(dtype, options.group_size)
        folder, sizes = f"engines/ort-cpu-{dtype}", _QUANTIZED_SIZES
        target = OnnxTarget(name, folder, dtype, scheme.group_size, "float32", _passes(scheme), sizes=sizes)
    else:
        target = OnnxTarget(kind, "engines/ort-cpu", "float32", 0, "float32", _passes(None), sizes=_SIZES)
    return (target.pruned() if options.sparsity else target,)


def _passes(scheme: IntFormat | None) -> dict[str, tuple[Pass, ...]]:
    """To ONNX Runtime's CPU kernels. scheme: of the decoder's weights, None for float32."""
    vision = (QuantizeLinear(VISION),) if scheme else ()
    linear = (QuantizeLinear(scheme), QuantizeEmbedding(EMBEDDING)) if scheme else ()
    experts = (QuantizeExperts(scheme),) if scheme else ()
    mixers = (LowerAttention(), LowerGatedDelta(), LowerHeadLinear())
    return {
        "vision": (*vision, LowerSegmentAttention(), FuseSkipNorm()),
        "decoder": (PackProjections(), *linear, *mixers, FuseSkipNorm(), LowerMoE(), *experts),
    }
