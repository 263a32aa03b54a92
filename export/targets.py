"""What each target makes of the canonical graphs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from moevlm.export.functions import add_functions
from moevlm.export.passes.base import Pass, run
from moevlm.export.passes.fuse_skip_norm import FuseSkipNorm
from moevlm.export.passes.lower_attention import LowerAttention
from moevlm.export.passes.lower_moe import LowerMoE
from moevlm.export.passes.lower_segment_attention import LowerSegmentAttention
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.export.passes.quantize_experts import QuantizeExperts
from moevlm.export.passes.quantize_linear import QuantizeLinear
from moevlm.export.quantization import Scheme
from moevlm.runtime.errors import BuildError
from moevlm.runtime.manifest import EngineFacts

REFERENCE = "reference"
GRAPHS = ("vision", "decoder")
PRECISIONS = {"float32": 0, "int8": 8, "int4": 4}  # bits of a quantized weight
BLOCKS = (32, 128)
BLOCK = 32
# Neither is what decoding waits for, so they get the bits that cost no accuracy.
EMBEDDING = Scheme(8, 32)
VISION = Scheme(8, 32)


@dataclass(frozen=True)
class Target:
    """name: as given to --target. folder: where its graphs lie in the bundle. dtype: of most weights.

    block: weights that share a scale, 0 if they are not quantized. passes: what lowers each of the canonical graphs.
    """

    name: str
    folder: str
    dtype: str
    block: int
    passes: Mapping[str, tuple[Pass, ...]]

    @property
    def engine(self) -> EngineFacts:
        vision, decoder = (self.path(graph) for graph in GRAPHS)
        return EngineFacts(vision=vision, decoder=decoder, dtype=self.dtype, block_size=self.block)

    def path(self, graph: str) -> str:
        """The path inside the bundle of the vision or the decoder graph."""
        return f"{self.folder}/{graph}.onnx"

    def lower(self, canonical: ir.Model, graph: str) -> ir.Model:
        """The vision or the decoder graph that this target runs; the canonical one stays, the weights are shared."""
        model = canonical.clone()
        run(self.passes[graph], model)
        add_functions(model)
        return model


def _ort_cpu(scheme: Scheme | None) -> dict[str, tuple[Pass, ...]]:
    """The passes to ONNX Runtime's CPU kernels; scheme: of the decoder's weights, None for float32."""
    projections = (PackProjections(), *((QuantizeLinear(scheme, EMBEDDING),) if scheme else ()))
    experts = (LowerMoE(), *((QuantizeExperts(scheme),) if scheme else ()))
    vision = (QuantizeLinear(VISION),) if scheme else ()
    return {
        "vision": (*vision, LowerSegmentAttention(), FuseSkipNorm()),
        "decoder": (*projections, LowerAttention(), FuseSkipNorm(), *experts),
    }


def _named(block: int) -> dict[str, Target]:
    # The reference engine is the canonical graphs themselves, with their weights.
    named = {REFERENCE: Target(REFERENCE, "graphs", "float32", 0, {name: () for name in GRAPHS})}
    for dtype, bits in PRECISIONS.items():
        scheme = Scheme(bits, block) if bits else None
        name, folder = ("ort-cpu", "engines/ort-cpu") if not bits else (f"ort-cpu:{dtype}", f"engines/ort-cpu-{dtype}")
        named[name] = Target(name, folder, dtype, block if bits else 0, _ort_cpu(scheme))
    return named


TARGETS = tuple(_named(BLOCK))


def targets(names: Iterable[str], block: int = BLOCK) -> tuple[Target, ...]:
    """The targets of these names, each once. block: weights per scale where they are quantized.

    Raises BuildError for an unknown name or an unsupported block.
    """
    if block not in BLOCKS:
        raise BuildError(f"unsupported block size {block} (supported: {', '.join(map(str, BLOCKS))})")
    known = _named(block)
    names = tuple(name.removesuffix(":fp32") for name in names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BuildError(f'unknown target "{unknown[0]}" (allowed: {", ".join(known)})')
    return tuple(known[name] for name in dict.fromkeys(names))
