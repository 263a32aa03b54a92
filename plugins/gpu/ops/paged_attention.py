"""Attention over pages as a GPU program has it: attributes, shapes and dtypes, all known when kernels are compiled."""

from dataclasses import dataclass

from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.experts import ACTIVATION_DTYPES
from moevlm.plugins.gpu.ops.paged_attention_draft import PagedAttentionDraft
from moevlm.plugins.gpu.ops.paged_heads import SCALE_BYTES
from moevlm.plugins.gpu.sizes import M, N, P, T, Tensor
from moevlm.plugins.ops.spec import AttentionSpec
from moevlm.runtime.core.errors import FieldError

CACHES = ("", "int8", "fp8")


@dataclass(frozen=True)
class PagedAttentionOp:
    """qkv [T, Hq*Dk + Hkv*Dk + Hkv*Dv] -> y [T, Hq*Dv]; see `moevlm.plugins.ops.attention.attention`.

    A row of qkv has all queries, then all keys, then all values, where spec.has_values.
    value_dim: of a value, in the key or not. dtype: of qkv and y, and of the caches where `cache` is "".
    key_cache [P, Hkv, page, W] and value_cache are written in place: W values of a head, or, with cache "int8" or "fp8"
    (e4m3), W = D + 4 bytes: a page's block of one head is then page_size * D codes, and page_size float32 scales.
    Whatever the inputs in int32 hold, nothing outside the inputs and outputs is touched.
    """

    spec: AttentionSpec
    key_dim: int
    value_dim: int
    dtype: str = "bfloat16"
    cache: str = ""
    page_size: int = 64
    has_norms: bool = False
    has_sinks: bool = False
    has_visible_end: bool = False

    name = "PagedAttention"

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("dtype", self.dtype, ACTIVATION_DTYPES),
            ("cache", self.cache, CACHES),
        ):
            if value not in allowed:
                raise FieldError(field, value, ", ".join(map(repr, allowed)))
        if self.page_size < 16 or self.page_size % 16:
            raise FieldError("page_size", self.page_size, "a multiple of 16")
        if self.spec.value_in_key and self.value_dim != self.spec.value_dim:
            raise FieldError("value_dim", self.value_dim, f"the spec's {self.spec.value_dim}")
        if self.spec.value_is_key and self.value_dim != self.key_dim:
            raise FieldError("value_dim", self.value_dim, f"key_dim = {self.key_dim}, as a value is its key")
        if self.spec.rotary_start + self.spec.rotary_dim > self.key_dim:
            raise FieldError("rotary_dim", self.spec.rotary_dim, f"up to {self.key_dim - self.spec.rotary_start}")

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        spec = self.spec
        values = spec.kv_heads * self.value_dim if spec.has_values else 0
        angles = (T, spec.rotary_dim // 2)
        tensors = [Tensor("qkv", self.dtype, (T, (spec.heads + spec.kv_heads) * self.key_dim + values))]
        if spec.rotary_dim:
            tensors += [Tensor(name, "float32", angles) for name in ("cos", "sin")]
        tensors.append(self._cache("key_cache", self.key_dim))
        if not spec.value_in_key:
            tensors.append(self._cache("value_cache", self.value_dim))
        tensors += [
            Tensor("query_start", "int32", (N + 1,)),
            Tensor("context_len", "int32", (N,)),
            Tensor("page_table", "int32", (N, M)),
        ]
        if self.has_norms:
            tensors += [Tensor(name, "float32", (self.key_dim,)) for name in ("q_norm", "k_norm")]
        if self.has_sinks:
            tensors.append(Tensor("sinks", "float32", (spec.heads,)))
        if self.has_visible_end:
            tensors.append(Tensor("visible_end", "int32", (T,)))
        return tuple(tensors)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (Tensor("y", self.dtype, (T, self.spec.heads * self.value_dim)),)

    def _cache(self, name: str, dim: int) -> Tensor:
        width, dtype = (dim + SCALE_BYTES, "int8") if self.cache else (dim, self.dtype)
        return Tensor(name, dtype, (P, self.spec.kv_heads, self.page_size, width), written=True)

    def draft(self, sm: int) -> Draft:
        """See `KernelOp`. Raises ValueError for bfloat16 on sm75, which has none."""
        return PagedAttentionDraft(self, sm).draft()
