"""Heads whose keys and values lie in pages, as attention's kernels are specialised to them."""

from dataclasses import dataclass

from moevlm.plugins.gpu.ops.heads import Heads, parts
from moevlm.plugins.ops.spec import AttentionSpec

SCALE_BYTES = 4  # of a quantized head of a token


@dataclass(frozen=True)
class PagedHeads(Heads):
    """group: query heads of a KV head. row: how many values a row of qkv has. value_width: what a value is padded to.

    cache: "", "int8" or "fp8". page: tokens of a page. key_block, value_block: values, or bytes where they are
    quantized, of one head in one page. native_fp8: the GPU converts e4m3 itself. has_bfloat16: it has such products.
    """

    heads: int
    kv_heads: int
    group: int
    row: int
    value_dim: int
    value_width: int
    value_in_key: bool
    value_is_key: bool
    value_norm: bool
    scale: float
    window: int
    chunk: int
    softcap: float
    has_sinks: bool
    has_visible_end: bool
    cache: str
    page: int
    key_block: int
    value_block: int
    native_fp8: bool
    has_bfloat16: bool

    @classmethod
    def of(
        cls,
        spec: AttentionSpec,
        key_dim: int,
        value_dim: int,
        cache: str,
        page: int,
        has_norms: bool,
        has_sinks: bool,
        has_visible_end: bool,
        sm: int,
    ) -> "PagedHeads":
        """What follows from the attributes of the op, and from a GPU's."""
        first, rest = parts(key_dim)
        values = spec.kv_heads * value_dim if spec.has_values else 0
        scales = SCALE_BYTES if cache else 0
        return cls(
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            group=spec.heads // spec.kv_heads,
            row=(spec.heads + spec.kv_heads) * key_dim + values,
            dim=key_dim,
            first=first,
            rest=rest,
            value_dim=value_dim,
            value_width=max(16, 1 << (value_dim - 1).bit_length()),
            value_in_key=spec.value_in_key,
            value_is_key=spec.value_is_key,
            value_norm=spec.value_norm,
            rotary_start=spec.rotary_start,
            half=spec.rotary_dim // 2,
            scale=spec.scale or key_dim**-0.5,
            window=spec.window,
            chunk=spec.chunk,
            softcap=spec.softcap,
            epsilon=spec.epsilon,
            has_norms=has_norms,
            has_sinks=has_sinks,
            has_visible_end=has_visible_end,
            cache=cache,
            page=page,
            key_block=page * (key_dim + scales),
            value_block=page * (value_dim + scales),
            native_fp8=sm >= 89,
            has_bfloat16=sm >= 80,
        )
