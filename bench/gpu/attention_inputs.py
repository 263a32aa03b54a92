"""Attention as real models have it, with caches of any length on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.ops.spec import AttentionSpec

PAGE = 64
CACHE_SCALE = 0.02  # of a quantized head of a token
Lengths = Sequence[tuple[int, int]]  # (tokens kept, tokens in the step) of each sequence


@dataclass(frozen=True)
class Model:
    """Layers that are all alike, with norms of queries and keys, and whole heads rotated."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int

    def op(self, dtype: str, cache: str = "") -> PagedAttentionOp:
        """cache: as PagedAttentionOp names it."""
        spec = AttentionSpec(self.heads, self.kv_heads, self.head_dim, epsilon=1e-6)
        return PagedAttentionOp(spec, self.head_dim, self.head_dim, dtype, cache, PAGE, has_norms=True)


QWEN_30B = Model("Qwen3-VL-30B-A3B", 32, 4, 128)
QWEN_235B = Model("Qwen3-VL-235B-A22B", 64, 4, 128)
QWEN35 = Model("Qwen3.5-35B-A3B", 16, 2, 256)  # which rotates a quarter of a head
GEMMA4 = Model("Gemma-4-26B-A4B", 16, 2, 512)  # its layers without a window


def draw(op: PagedAttentionOp, lengths: Lengths, device: str) -> dict[str, torch.Tensor]:
    """Inputs by name, pages in random order."""
    needed = [-(-(context + length) // PAGE) for context, length in lengths]
    pages, tokens = 1 + sum(needed), sum(length for _, length in lengths)
    order = (1 + torch.randperm(pages - 1, dtype=torch.int32)).split(needed)
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for n, own in enumerate(order):
        table[n, : len(own)] = own
    start = torch.tensor([0, *(length for _, length in lengths)]).cumsum(0)
    angle = 6 * torch.rand(tokens, op.spec.rotary_dim // 2, device=device)
    sizes = {"T": tokens, "N": len(lengths), "M": table.shape[1], "P": pages}
    found = {
        "cos": angle.cos(),
        "sin": angle.sin(),
        "query_start": start.int(),
        "context_len": torch.tensor([context for context, _ in lengths], dtype=torch.int32),
        "page_table": table,
        "q_norm": 0.5 + torch.rand(op.key_dim, device=device),
        "k_norm": 0.5 + torch.rand(op.key_dim, device=device),
    }
    for tensor in op.inputs:
        if tensor.written:
            found[tensor.name] = _cache(op, tensor.at(sizes), device)
        elif tensor.name not in found:
            found[tensor.name] = torch.randn(tensor.at(sizes), device=device, dtype=getattr(torch, tensor.dtype))
    return {tensor.name: found[tensor.name].to(device) for tensor in op.inputs}


def _cache(op: PagedAttentionOp, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Random numbers; quantized ones with scales behind a page's codes."""
    if not op.cache:
        return torch.randn(shape, device=device, dtype=getattr(torch, op.dtype))
    codes = torch.randint(-126, 126, shape, dtype=torch.int8, device=device)
    codes.masked_fill_(codes == -1, 0)  # in e4m3, it is no number
    scales = codes.view(*shape[:2], -1)[..., -PAGE * 4 :].view(torch.float32)
    scales.fill_(CACHE_SCALE)
    return codes


def cached(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """[N, Hkv, length, D], contiguous, of a cache that is not quantized; table: [N, M]."""
    pages = cache[table[:, : -(-length // PAGE)].long()]  # [N, M, Hkv, page, D]
    return pages.transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()


def queries(op: PagedAttentionOp, inputs: dict[str, torch.Tensor], length: int) -> torch.Tensor:
    """[N, Hq, length, D] as they are after norm and rotation, for sequences that have so many tokens each."""
    q = inputs["qkv"][:, : op.spec.heads * op.key_dim].float().view(-1, op.spec.heads, op.key_dim)
    q = q * (q.square().mean(-1, keepdim=True) + op.spec.epsilon).rsqrt() * inputs["q_norm"]
    a, b = q.chunk(2, dim=-1)
    cos, sin = inputs["cos"][:, None], inputs["sin"][:, None]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(inputs["qkv"].dtype)
    return turned.view(-1, length, op.spec.heads, op.key_dim).transpose(1, 2).contiguous()
