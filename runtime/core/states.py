"""What a sequence keeps between steps, layer by layer: pages of keys and values, or a row of a recurrent state."""

from __future__ import annotations

import math

import msgspec

from moevlm.runtime.core.dtypes import DTYPES

PAGE_SIZE = 64  # tokens; a power of two, and every kernel takes its keys in blocks that pages divide
QUANTIZED = ("int8", "float8_e4m3fn")
STATE_DTYPES = ("float32", "bfloat16", "float16", *QUANTIZED)
SCALE_BYTES = 4  # a quantized cache keeps a float32 scale beside the values of each token and head


class PagedKV(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="paged_kv"):
    """Keys and values of one layer's tokens, in pages that the sequences of a step share one pool of.

    key_dim, value_dim: of a head. value_in_key: a value is the first value_dim dimensions of its key, and there is no
    value cache (MLA). window: how many tokens back a query sees, itself included; 0 for all. chunk: of positions, of
    which a query sees its own alone; 0 for one. dtype: float32, bfloat16, float16, or int8 or float8_e4m3fn with a
    float32 scale for each token and head.
    """

    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int
    value_in_key: bool = False
    window: int = 0
    chunk: int = 0
    dtype: str = "float32"

    @property
    def widths(self) -> dict[str, int]:
        """Elements of a token and head in each cache, a scale included, by the name of the graph's input."""
        scale = SCALE_BYTES if self.dtype in QUANTIZED else 0
        widths = {f"key_cache.{self.layer}": self.key_dim + scale}
        if not self.value_in_key:
            widths[f"value_cache.{self.layer}"] = self.value_dim + scale
        return widths

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the graph's inputs; an output ends in `_out` before the layer's number."""
        return tuple(self.widths)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in this layer."""
        return self.kv_heads * sum(self.widths.values()) * DTYPES[self.dtype].bytes


class Recurrent(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="recurrent"
):
    """A state of one layer with a fixed size for a sequence, whatever its length: one row of [rows, *shape].

    name: of the graph's input `NAME_state.LAYER`. A sequence's row is zero before its first token.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def tensor(self) -> str:
        """The name of the graph's input; the output ends in `_out` before the layer's number."""
        return f"{self.name}_state.{self.layer}"

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)

    @property
    def row_bytes(self) -> int:
        """Bytes that one sequence takes in this layer."""
        return math.prod(self.shape) * DTYPES[self.dtype].bytes


StateSpec = PagedKV | Recurrent


def output_name(tensor: str) -> str:
    """The graph's output that replaces a state: key_cache_out.3 for key_cache.3."""
    name, _, layer = tensor.rpartition(".")
    return f"{name}_out.{layer}"


def row_bytes(states: tuple[StateSpec, ...]) -> int:
    """Bytes of one row of all recurrent states together: what a sequence takes whatever its length, or a snapshot."""
    return sum(state.row_bytes for state in states if isinstance(state, Recurrent))


def page_bytes(states: tuple[StateSpec, ...], page_size: int = PAGE_SIZE) -> int:
    """Bytes of one page in all layers together."""
    return page_size * sum(state.token_bytes for state in states if isinstance(state, PagedKV))
