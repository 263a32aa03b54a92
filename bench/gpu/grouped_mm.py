"""The peer: a router of torch operations, and experts as two `grouped_mm`, as transformers 5 runs them.

Sorted rows, one product over all experts, activation, a second product, weights, and back to the order of the tokens
(`transformers.integrations.moe`, "grouped_mm"). Everything can be captured in a graph.
"""

import torch
from torch.nn import functional

from moevlm.plugins.ops.spec import RouterSpec

ACTIVATIONS = {"silu": functional.silu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh")}
Tensor = torch.Tensor


def grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [n, in], sorted by expert and ending at ends [E] int32, times weight [E, out, in] -> [n, out]."""
    product = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    return product(rows, weight.transpose(-2, -1), offs=ends)


def experts(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """y [T, H] of x [T, H], index [T, k] and weight [T, k]; gate_up [E, 2I, H], down [E, H, I], all in x's dtype."""
    tokens, top_k = index.shape
    chosen, order = torch.sort(index.reshape(-1))
    values = chosen.int() if x.is_cuda else chosen.float()  # what histc takes differs
    counts = torch.histc(values, bins=gate_up.shape[0], min=0, max=gate_up.shape[0] - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    gate, up = grouped_mm(x[order // top_k], gate_up, ends).chunk(2, dim=-1)
    out = grouped_mm(ACTIVATIONS[activation](gate) * up, down, ends) * weight.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return out[back].view(tokens, top_k, -1).sum(dim=1).to(x.dtype)


def route(
    logits: Tensor, spec: RouterSpec, bias: Tensor | None = None, expert_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """index [T, k] int64 and weight [T, k] float32 of logits [T, E]: softmax or sigmoid scores, groups by top2_sum."""
    scores = torch.sigmoid(logits) if spec.scoring == "sigmoid" else torch.softmax(logits, -1)
    choice = scores if bias is None else scores + bias
    if spec.n_group > 1:
        grouped = choice.view(len(choice), spec.n_group, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(spec.topk_group, dim=-1).indices
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, True)
        choice = grouped.masked_fill(~kept[:, :, None], float("-inf")).view(choice.shape)
    index = choice.topk(spec.top_k, dim=-1).indices
    weight = scores.gather(1, index)
    if spec.renormalize:
        weight = weight / (weight.sum(-1, keepdim=True) + spec.epsilon)
    weight = weight * spec.scale
    return index, weight if expert_scale is None else weight * expert_scale[index]
