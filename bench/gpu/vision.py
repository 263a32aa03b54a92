"""Attention among patches as Qwen3-VL's vision encoder has it, against PyTorch's own and the GPU's peak.

Ours rotates queries and keys, too; PyTorch's are given what is rotated already, each head's rows side by side.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.device import Device
from bench.gpu.layers import TOLERANCE, relative_norm
from bench.gpu.limits import measure_limits
from bench.gpu.shapes import Limits
from bench.gpu.torch_attention import BACKENDS, Attention
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp

HEADS, HEAD_DIM = 16, 72
CALLS = {  # images of equal size: how many, and patches of each
    "a photo of 1920 x 1080": (1, 8160),
    "8 images of 512 x 512": (8, 1024),
    "a photo of 16.7 megapixels": (1, 65536),
}
Tensor = torch.Tensor


def run(sm: int) -> Iterator[dict[str, Any]]:
    """Ours and each kernel of scaled_dot_product_attention, then flex_attention, which takes long to compile."""
    torch.manual_seed(0)
    op = SegmentAttentionOp(HEADS, HEAD_DIM, Device(sm).dtype)
    yield from measure(op, CALLS, Device(sm), measure_limits())


def measure(
    op: SegmentAttentionOp, calls: Mapping[str, tuple[int, int]], device: Device, limits: Limits
) -> Iterator[dict[str, Any]]:
    """An entry per call and implementation."""
    runner = device.runner(op)
    drawn = {name: draw(op, *call, device.name) for name, call in calls.items()}

    def entry(name: str, by: str, call: Callable[[], object]) -> dict[str, Any]:
        images, patches = calls[name]
        seconds, operations = device.seconds([call]), 4 * images * patches**2 * op.heads * op.head_dim
        times = {"seconds": seconds, "operations": operations, "of_peak": limits.of_peak(operations, seconds)}
        return {"kind": "vision", "images": name, "by": by} | times

    for name, (inputs, rotated) in drawn.items():
        ours = runner.prepare(inputs)
        found = entry(name, "ours", ours)
        difference = relative_norm(ours.outputs[0], rows(scaled_dot_product_attention(*rotated)))
        if not difference <= TOLERANCE:
            found["error"] = f"ours and torch's differ by {difference:.2g} (allowed: up to {TOLERANCE:g})"
        yield found
    runner.close()
    for by, attend in (*kernels(), ("flex", flex(device))):
        for name, (_, rotated) in drawn.items():
            try:
                yield entry(name, by, partial(attend, *rotated))
            except Exception as error:  # the others' times stand
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                yield {"kind": "vision", "images": name, "by": by, "skipped": why}


def kernels() -> Iterator[tuple[str, Attention]]:
    """scaled_dot_product_attention by the names of its fused kernels."""
    for name, backend in BACKENDS.items():

        def attend(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        yield name, attend


def flex(device: Device) -> Attention:
    """flex_attention as it is meant to be used: compiled, where there is a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device.name == "cuda" else flex_attention


def draw(op: SegmentAttentionOp, images: int, patches: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """The op's inputs, and its queries, keys and values [images, heads, patches, D], rotated."""
    total, dtype = images * patches, getattr(torch, op.dtype)
    qkv = torch.randn(total, 3 * op.heads * op.head_dim, device=device, dtype=dtype)
    angle = 6 * torch.rand(total, op.head_dim // 2, device=device)
    start = patches * torch.arange(images + 1, device=device, dtype=torch.int32)
    cos, sin = angle.cos(), angle.sin()
    split = qkv.view(images, patches, 3, op.heads, op.head_dim).permute(2, 0, 3, 1, 4)
    turns = [turn.view(images, 1, patches, -1) for turn in (cos, sin)]
    rotated = [rotate(x.float(), *turns).to(dtype).contiguous() for x in split[:2]]
    return [qkv, cos, sin, start], [*rotated, split[2].contiguous()]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `moevlm.plugins.ops.attention.rotate`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rows(y: Tensor) -> Tensor:
    """[images, heads, patches, D] as the op has it: [images * patches, heads * D]."""
    return y.transpose(1, 2).reshape(y.shape[0] * y.shape[2], -1)
