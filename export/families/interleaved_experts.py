"""Experts whose gate and up rows take turns: g0, u0, g1, u1 and so on (gpt-oss)."""

from dataclasses import dataclass

from moevlm.export.families.experts import ExpertsPart
from moevlm.export.families.sources import Indices, Shape, Source, Tensors, named
from moevlm.export.graph.moved_codes import coded
from moevlm.export.graph.rearranged import Picked, swap_last
from moevlm.export.graph.weights import Weight


@dataclass(frozen=True)
class InterleavedExperts:
    """All experts of a layer under `base`, fused, and their biases [E, 2I] and [E, H].

    Numbers lie as [E, H, 2I] and [E, I, H], as transformers has them, and the blocks of MXFP4 as [E, 2I, H] and
    [E, H, I]: never by shape, because H and I are often equal. An `expert_layout` other than "auto" decides for both.
    """

    base: str

    def gate_up(self) -> ExpertsPart:
        """Canonically [E, 2I, H], gate rows first."""
        return ExpertsPart(self.base, self._matrices("gate_up_proj"), _apart)

    def down(self) -> ExpertsPart:
        """Canonically [E, H, I]."""
        return ExpertsPart(self.base, self._matrices("down_proj"))

    def gate_up_bias(self) -> Source:
        """Canonically [E, 2I], those of gates first."""
        stored = named(f"{self.base}.gate_up_proj_bias")
        return lambda *given: _apart(stored(*given))

    def down_bias(self) -> Source:
        """[E, H]."""
        return named(f"{self.base}.down_proj_bias")

    def _matrices(self, part: str) -> Source:
        pattern = f"{self.base}.{part}"
        stored = named(pattern)

        def source(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
            own = coded(tensors[pattern.format(**indices)])
            in_blocks = own is not None and own.form.kind == "fp4"
            if layout == "out_in" or (layout == "auto" and in_blocks):
                return stored(tensors, indices, shape, layout)
            return swap_last(stored(tensors, indices, (shape[0], shape[2], shape[1]), layout))

        return source


def _apart(weight: Weight) -> Weight:
    """[E, 2I, ...], the even rows first, then the odd ones."""
    rows = weight.shape[1]
    return Picked(weight, [*range(0, rows, 2), *range(1, rows, 2)])
