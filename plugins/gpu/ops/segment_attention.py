"""Attention among an image's patches as a GPU program has it: attributes and shapes, all known when it is compiled."""

from dataclasses import dataclass
from math import e, log2

from moevlm.plugins.gpu.draft import MAX_TOKENS, Draft, KernelSpec
from moevlm.plugins.gpu.ops.heads import Heads, parts, require_heads
from moevlm.plugins.gpu.program import TOKENS, Argument, Launch, Variant
from moevlm.plugins.gpu.sizes import ONE, SYMBOLS, Count, Linear, N, T, Tensor, at_most, fixed, per_token
from moevlm.plugins.gpu.tiles import segment_tile
from moevlm.runtime.core.dtypes import DTYPES

ROTATE_STEP = 64  # patches that one program rotates
_IMAGES = Argument("symbol", SYMBOLS.index("N"))
_TURNED = Argument("workspace", 0)


@dataclass(frozen=True)
class SegmentAttentionOp:
    """qkv [T, 3 * heads * D] -> y [T, heads * D]; see `moevlm.plugins.ops.attention.segment_attention`.

    A row of qkv has all queries, then all keys, then all values. T: patches, N: images. dtype: of qkv and y.
    rotates: whether queries and keys are, by cos and sin.
    Patches that no image has get no y. Whatever image_start holds, nothing outside the inputs and outputs is touched.
    """

    heads: int
    head_dim: int
    dtype: str = "bfloat16"
    rotates: bool = True

    name = "SegmentAttention"

    def __post_init__(self) -> None:
        require_heads(self.heads, self.head_dim, self.dtype)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        tables = ("cos", "sin") if self.rotates else ()
        return (
            Tensor("qkv", self.dtype, (T, 3 * self.heads * self.head_dim)),
            *(Tensor(name, "float32", (T, self.head_dim // 2)) for name in tables),
            Tensor("image_start", "int32", (N + 1,)),
        )

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (Tensor("y", self.dtype, (T, self.heads * self.head_dim)),)

    def draft(self, sm: int) -> Draft:
        """See `KernelOp`. Raises ValueError for bfloat16 on sm75, which has none."""
        if self.dtype == "bfloat16" and sm < 80:
            raise ValueError(f"dtype = bfloat16 on sm{sm} (allowed: float16)")
        first, rest = parts(self.head_dim)
        half = self.head_dim // 2 if self.rotates else 0
        heads = Heads(self.head_dim, first, rest, rotary_start=0, half=half, epsilon=0, has_norms=False)
        tile = segment_tile(DTYPES[self.dtype].bits, first + rest, sm)
        given = DTYPES[self.dtype].pointer
        shape = (("HEADS", self.heads), ("H", heads), ("OVERLAPS", sm >= 90))
        rotate = KernelSpec(
            "rotate_patches",
            (given, "*fp32", "*fp32", given, "i32"),
            # Scores are in base 2.
            (*shape, ("SCALE", self.head_dim**-0.5 * log2(e)), ("BM", ROTATE_STEP)),
        )
        attend = KernelSpec(
            "segment_attention",
            (given, given, "*i32", given, "i32", "i32"),
            (*shape, ("BM", tile.BM), ("BN", tile.BN), ("INTERPRETED", False)),
            tile.warps,
            tile.stages,
        )
        qkv, *tables, image_start = (Argument("input", i) for i in range(len(self.inputs)))
        cos, sin = tables or (image_start, image_start)  # of no half a head nothing is read
        steps = (
            Launch(
                0,
                (per_token(1, divisor=ROTATE_STEP), fixed(2 * self.heads), ONE),
                (qkv, cos, sin, _TURNED, TOKENS),
            ),
            Launch(
                1,
                (Count(Linear(T=1, N=tile.BM), tile.BM), fixed(self.heads), ONE),
                (qkv, _TURNED, image_start, Argument("output", 0), TOKENS, _IMAGES),
                overlaps=sm >= 90,
            ),
        )
        turned = per_token(2 * self.heads * self.head_dim * DTYPES[self.dtype].bytes)
        variant = Variant((at_most(MAX_TOKENS), at_most(MAX_TOKENS, "N")), (turned,), steps)
        return Draft(self.name, self.inputs, self.outputs, sm, (rotate, attend), (variant,))
