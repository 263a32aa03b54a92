"""What each target makes of the canonical graphs."""

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from moevlm.export.functions import add_functions
from moevlm.export.passes.base import Pass, run
from moevlm.export.passes.lower_attention import LowerAttention
from moevlm.export.passes.lower_moe import LowerMoE
from moevlm.export.passes.lower_segment_attention import LowerSegmentAttention
from moevlm.runtime.errors import BuildError
from moevlm.runtime.manifest import EngineFacts

REFERENCE = "reference"
GRAPHS = ("vision", "decoder")


@dataclass(frozen=True)
class Target:
    """name: as given to --target. folder: where its graphs lie in the bundle. passes: what lowers a canonical graph."""

    name: str
    folder: str
    dtype: str
    passes: tuple[Pass, ...]

    @property
    def engine(self) -> EngineFacts:
        vision, decoder = (self.path(graph) for graph in GRAPHS)
        return EngineFacts(vision=vision, decoder=decoder, dtype=self.dtype)

    def path(self, graph: str) -> str:
        """The path inside the bundle of the vision or the decoder graph."""
        return f"{self.folder}/{graph}.onnx"

    def lower(self, canonical: ir.Model) -> ir.Model:
        """The graph that this target runs; the canonical one stays as it is, weights are shared recipes."""
        model = canonical.clone()
        run(self.passes, model)
        add_functions(model)
        return model


# The reference engine is the canonical graphs themselves, with their weights.
TARGETS = {
    target.name: target
    for target in (
        Target(REFERENCE, "graphs", "float32", ()),
        Target("ort-cpu", "engines/ort-cpu", "float32", (LowerAttention(), LowerSegmentAttention(), LowerMoE())),
    )
}


def targets(names: Iterable[str]) -> tuple[Target, ...]:
    """The targets of these names, each once. Raises BuildError for an unknown one."""
    names = tuple(names)
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise BuildError(f'unknown target "{unknown[0]}" (allowed: {", ".join(TARGETS)})')
    return tuple(TARGETS[name] for name in dict.fromkeys(names))
