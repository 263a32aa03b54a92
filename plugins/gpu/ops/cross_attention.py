"""Attention of queries that all images share, as a GPU program has it: attributes and shapes, known when compiled."""

from dataclasses import dataclass
from math import e, log2

from moevlm.plugins.gpu.draft import MAX_TOKENS, Draft, KernelSpec
from moevlm.plugins.gpu.ops.heads import Heads, parts, require_heads
from moevlm.plugins.gpu.program import TOKENS, Argument, Launch, Variant
from moevlm.plugins.gpu.sizes import ONE, Count, Linear, N, T, Tensor, at_most, fixed
from moevlm.plugins.gpu.tiles import segment_tile
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import FieldError

MOST_COLUMNS = 64  # of a tile: with more, registers spill on SM90


@dataclass(frozen=True)
class CrossAttentionOp:
    """q [queries, heads * D], kv [T, 2 * heads * D] -> y [N, queries, heads * D].

    See `moevlm.plugins.ops.attention.cross_attention`. A row of kv has all keys, then all values. T: patches, N:
    images. dtype: of q, kv and y. Whatever image_start holds, nothing outside the inputs and outputs is touched; where
    an image has no patches, y is not a number.
    """

    queries: int
    heads: int
    head_dim: int
    dtype: str = "bfloat16"

    name = "CrossAttention"

    def __post_init__(self) -> None:
        require_heads(self.heads, self.head_dim, self.dtype)
        # The kernel finds a query's row in 32 bits; in 64 it takes more registers, and spills on SM120.
        most = ((1 << 31) - 1) // (self.heads * self.head_dim)
        if not 1 <= self.queries <= most:
            raise FieldError("queries", self.queries, f"1 to {most}, whose numbers are fewer than 2 ** 31")

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        width = self.heads * self.head_dim
        return (
            Tensor("q", self.dtype, (self.queries, width)),
            Tensor("kv", self.dtype, (T, 2 * width)),
            Tensor("image_start", "int32", (N + 1,)),
        )

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (Tensor("y", self.dtype, (N, self.queries, self.heads * self.head_dim)),)

    def draft(self, sm: int) -> Draft:
        """See `KernelOp`. Raises ValueError for bfloat16 on sm75, which has none."""
        if self.dtype == "bfloat16" and sm < 80:
            raise ValueError(f"dtype = bfloat16 on sm{sm} (allowed: float16)")
        first, rest = parts(self.head_dim)
        heads = Heads(self.head_dim, first, rest, rotary_start=0, half=0, epsilon=0, has_norms=False)
        tile = segment_tile(DTYPES[self.dtype].bits, first + rest, sm)
        given = DTYPES[self.dtype].pointer
        attend = KernelSpec(
            "cross_attention",
            (given, given, "*i32", given, "i32"),
            (
                *(("QUERIES", self.queries), ("HEADS", self.heads), ("H", heads)),
                ("SCALE", self.head_dim**-0.5 * log2(e)),  # scores are in base 2
                *(("BM", tile.BM), ("BN", min(tile.BN, MOST_COLUMNS)), ("INTERPRETED", False)),
            ),
            tile.warps,
            tile.stages,
        )
        tiles = -(-self.queries // tile.BM)
        step = Launch(
            0,
            (Count(Linear(N=tiles)), fixed(self.heads), ONE),
            (*(Argument("input", i) for i in range(3)), Argument("output"), TOKENS),
        )
        variant = Variant((at_most(MAX_TOKENS), at_most(MAX_TOKENS, "N")), (), (step,))
        return Draft(self.name, self.inputs, self.outputs, sm, (attend,), (variant,))
