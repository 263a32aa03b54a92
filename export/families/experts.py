"""All experts of a layer, however they lie: one tensor per expert and part, or fused in either of two layouts."""

from collections.abc import Callable
from dataclasses import dataclass

from moevlm.export.families.sources import Indices, Shape, Source, Tensors, expect, stored
from moevlm.export.graph.rearranged import swap_last
from moevlm.export.graph.weights import Concat, Stack, Weight
from moevlm.runtime.core.errors import CheckpointError

# The last two axes of fused expert tensors: out_in is [E, 2I, H] and [E, H, I], in_out is [E, H, 2I] and [E, I, H].
LAYOUTS = ("auto", "out_in", "in_out")


@dataclass(frozen=True)
class Experts:
    """All experts of a layer under `base`, however they lie: one tensor per expert and part, or fused in either layout.

    per_expert: the names to ask for where a layer has none of either. bank: of a layer's experts that are numbered one
    bank after the other, as many in each.
    """

    base: str
    per_expert: bool
    bank: int = 0

    def gate_up(self) -> "ExpertsPart":
        """Canonically [E, 2I, H], gate rows first."""
        return ExpertsPart(
            self.base,
            self._source("gate_up", ("gate", "up"), "down", lambda shape: (shape[0], shape[2], shape[1] // 2)),
        )

    def down(self) -> "ExpertsPart":
        """Canonically [E, H, I]."""
        return ExpertsPart(
            self.base, self._source("down", ("down",), "gate_up", lambda shape: (shape[0], 2 * shape[2], shape[1]))
        )

    def _source(self, part: str, parts: tuple[str, ...], other: str, other_shape: Callable[[Shape], Shape]) -> Source:
        fused = _fused(f"{self.base}.{part}_proj", f"{self.base}.{other}_proj", other_shape)
        stacked = _stacked(self.bank, *(f"{self.base}.{{e}}.{name}_proj.weight" for name in parts))

        def source(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
            base = self.base.format(**indices)
            is_fused = any(f"{base}.{name}_proj" in tensors for name in ("gate_up", "down"))
            one = [f"{base}.0.{name}_proj.weight" for name in ("gate", "up", "down")]
            is_stacked = not is_fused and (self.per_expert or any(name in tensors for name in one))
            return (stacked if is_stacked else fused)(tensors, indices, shape, layout)

        return source


@dataclass(frozen=True)
class ExpertsPart:
    """One tensor of all experts of a layer, as the model wants it. base: the layer's experts, as in `Experts`.

    arranged: what happens to it behind an adapter's updates, which have the order of rows on disk.
    """

    base: str
    source: Source
    arranged: Callable[[Weight], Weight] = lambda weight: weight

    def __call__(self, tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
        return self.source(tensors, indices, shape, layout)


def _fused(pattern: str, sibling: str, sibling_shape: Callable[[Shape], Shape]) -> Source:
    """Either of the two layouts on disk, told apart by shape.

    A square tensor says nothing of itself. If its sibling in the layer has the canonical layout, so has it, and every
    reader agrees; if the sibling has the other one, Hugging Face turns the sibling and leaves the square tensor as it
    is, so its meaning is open and the option has to say.
    """

    def source(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
        name = pattern.format(**indices)
        weight, swapped = stored(tensors, name), (shape[0], shape[2], shape[1])
        if layout == "in_out":
            return swap_last(expect(name, weight, swapped))
        if layout == "auto" and shape == swapped:
            other = sibling.format(**indices)
            if stored(tensors, other).shape != sibling_shape(shape):
                raise CheckpointError(
                    f"tensor {name} is square, {list(weight.shape)}, so its layout is ambiguous "
                    "(--expert-layout out_in or in_out says which)"
                )
        elif layout == "auto" and weight.shape == swapped:
            return swap_last(weight)
        return expect(name, weight, shape)

    return source


def _stacked(bank: int, *patterns: str) -> Source:
    """One tensor per expert, {e}, and per part: equal parts joined (gate rows, then up rows), the experts stacked."""

    def source(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
        if layout != "auto":
            name = patterns[0].format(e=0, **indices)
            raise CheckpointError(f"--expert-layout {layout} is for fused experts, {name} is a tensor of one expert")
        part, experts = (shape[1] // len(patterns), *shape[2:]), []
        for e in range(bank * shape[0], (bank + 1) * shape[0]):
            names = [pattern.format(e=e, **indices) for pattern in patterns]
            experts.append(Concat([expect(name, stored(tensors, name), part) for name in names]))
        return Stack(experts)

    return source
