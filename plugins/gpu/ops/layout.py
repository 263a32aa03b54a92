"""A variant of a draft while it is laid out."""

from dataclasses import dataclass, field

from moevlm.plugins.gpu.program import Argument, Fill, Launch, TensorMap, Variant
from moevlm.plugins.gpu.sizes import Count, Linear, at_most
from moevlm.runtime.core.dtypes import DTYPES

Given = tuple[Argument, str]  # what a kernel is given, and its type


@dataclass
class Layout:
    """Buffers, tensor maps and steps so far."""

    buffers: list[Count] = field(default_factory=list)
    maps: list[TensorMap] = field(default_factory=list)
    steps: list[Launch | Fill] = field(default_factory=list)

    def buffer(self, kind: str, size: Count) -> Given:
        """One more buffer of `size` bytes. kind: "*i32"."""
        self.buffers.append(size)
        return Argument("workspace", len(self.buffers) - 1), kind

    def map(self, source: Given, shape: tuple[int, ...], block: tuple[int, ...], dtype: str) -> Given:
        """One more tensor map, of an array at `source`."""
        self.maps.append(TensorMap(source[0], dtype, Linear(shape[0]), shape[1:], block))
        kind = f"tensordesc<{DTYPES[dtype].pointer[1:]}[{','.join(map(str, block))}]>"
        return Argument("tensor_map", len(self.maps) - 1), kind

    def variant(self, max_tokens: int) -> Variant:
        return Variant((at_most(max_tokens),), tuple(self.buffers), tuple(self.steps), tuple(self.maps))
