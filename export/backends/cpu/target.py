"""The targets of this package's own CPU operators, in ONNX Runtime."""

from moevlm.export.backends.base import Target
from moevlm.export.backends.cpu.options import Options
from moevlm.export.backends.cpu.passes.attention import CpuAttention
from moevlm.export.backends.cpu.passes.candidates import CpuCandidates
from moevlm.export.backends.cpu.passes.gated_delta import CpuGatedDelta
from moevlm.export.backends.cpu.passes.head_linear import CpuHeadLinear
from moevlm.export.backends.cpu.passes.linear import CpuFloatLinear, CpuLinear
from moevlm.export.backends.cpu.passes.moe import CpuMoE
from moevlm.export.backends.onnx_target import EMBEDDING, VISION, OnnxTarget
from moevlm.export.backends.ort.passes.lower_segment_attention import LowerSegmentAttention
from moevlm.export.backends.sizes import Sizes
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.registry import INTEGERS, int_format
from moevlm.export.passes.base import Pass
from moevlm.export.passes.fuse_skip_norm import FuseSkipNorm
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.export.passes.quantize_embedding import QuantizeEmbedding
from moevlm.plugins.cpu import limits
from moevlm.runtime.backends.libraries import DOMAIN
from moevlm.runtime.core import defaults
from moevlm.runtime.core.states import PAGE_SIZE

_SIZES = Sizes(
    heads=limits.HEADS,
    key_dim=limits.KEY_DIM,
    value_dim=limits.VALUE_DIM,
    head_dim_multiple=2,
    delta_dim=limits.DELTA_DIM,
    delta_dim_multiple=2,
    convolution=limits.CONVOLUTION,
    experts=limits.EXPERTS,
)


def targets(name: str, options: Options) -> tuple[Target, ...]:
    """The target of this name; cpu is the default one. Empty if there is none."""
    name = defaults.TARGET if name == "cpu" else name
    _, _, dtype = name.partition(":")
    if dtype not in INTEGERS:
        return ()
    scheme = int_format(dtype, options.group_size)
    target = OnnxTarget(
        name=name,
        folder=f"engines/cpu-{dtype}",
        dtype=dtype,
        group_size=scheme.group_size,
        kv_cache=options.kv_cache,
        passes=_passes(scheme, options.kv_cache),
        operators=DOMAIN,
        sizes=_SIZES,
        page_size=PAGE_SIZE,
        row_independent=True,
    )
    return (target.pruned() if options.sparsity else target,)


def _passes(scheme: IntFormat, kv_cache: str) -> dict[str, tuple[Pass, ...]]:
    """To moevlm's own CPU kernels, in ONNX Runtime."""
    linear = (PackProjections(), CpuLinear(scheme), QuantizeEmbedding(EMBEDDING))
    attention = CpuAttention(kv_cache)
    return {
        "vision": (CpuLinear(VISION), LowerSegmentAttention(), FuseSkipNorm()),
        "decoder": (
            *linear,
            CpuFloatLinear(),
            attention,
            CpuHeadLinear(scheme),
            CpuGatedDelta(),
            CpuMoE(scheme),
            FuseSkipNorm(),
            CpuCandidates(),
        ),
    }
