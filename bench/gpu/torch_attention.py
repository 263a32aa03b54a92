"""The peers: PyTorch's attention kernels on contiguous keys and values, without norms, rotation and writing."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Tensor = torch.Tensor
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused() -> Iterator[tuple[str, Attention]]:
    """scaled_dot_product_attention with each of its fused kernels: (name, function of q, k, v).

    q: [N, Hq, S, D], the last S of the tokens in k and v: [N, Hkv, C, D]. Each raises RuntimeError where its kernel
    does not take them.
    """
    for name, backend in BACKENDS.items():

        def attend(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            length, total = q.shape[2], k.shape[2]
            options: dict[str, Any] = {"is_causal": length == total > 1}
            if 1 < length < total:
                from torch.nn.attention.bias import causal_lower_right  # takes seconds

                options = {"attn_mask": causal_lower_right(length, total)}
            # A mask of this kind chooses its kernel itself, and refuses to be told.
            with nullcontext() if "attn_mask" in options else sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)

        yield name, attend


def flex(compiled: bool = True) -> Attention:
    """flex_attention, compiled for each shape: some ten seconds."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    masks: dict[tuple[int, int], Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, total = q.shape[2], k.shape[2]
        if length == 1:
            return attention(q, k, v, enable_gqa=True)
        if (length, total) not in masks:
            behind = total - length
            masks[length, total] = create_block_mask(
                lambda _b, _h, query, key: query + behind >= key, None, None, length, total, device=q.device.type
            )
        return attention(q, k, v, block_mask=masks[length, total], enable_gqa=True)

    return attend
