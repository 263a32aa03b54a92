"""The graph ops that torch has no word for, as torch custom ops: traced as one node each, and runnable as they are.

They run the numpy spec itself, so comparing the canonical modules with Hugging Face checks the spec too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moevlm.export.formats.activations import rounded
from moevlm.plugins.ops.attention import attention
from moevlm.plugins.ops.attention import cross_attention as reference_cross_attention
from moevlm.plugins.ops.attention import segment_attention as reference_segment_attention
from moevlm.plugins.ops.experts import experts as reference_experts
from moevlm.plugins.ops.router import route, weigh
from moevlm.plugins.ops.spec import AttentionSpec, ExpertsSpec, RouterSpec


@dataclass(frozen=True, eq=False)
class Arithmetic:
    """The places where an engine computes otherwise than the canonical modules; none by default.

    chosen: [T, k] int32, the experts that tokens go to, instead of the router's own choice.
    group_size: experts and matrices of heads round activations to int8 on their way into weights, with a scale for so
    many; 0: they do not.
    int8_cache: keys and values are rounded to int8, with a scale for each token and head.
    """

    chosen: np.ndarray | None = None
    group_size: int = 0
    int8_cache: bool = False


_arithmetic: ContextVar[Arithmetic | None] = ContextVar("arithmetic", default=None)


@contextmanager
def computing(arithmetic: Arithmetic) -> Iterator[None]:
    """Let the ops in the block compute with this arithmetic."""
    token = _arithmetic.set(arithmetic)
    try:
        yield
    finally:
        _arithmetic.reset(token)


def arithmetic() -> Arithmetic:
    """The arithmetic of the block that runs now."""
    return _arithmetic.get() or Arithmetic()


@torch.library.custom_op("moevlm::router", mutates_args=())
def router(
    logits: Tensor,
    bias: Tensor | None,
    expert_scale: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: int,
    epsilon: float,
    scale: float,
    n_group: int,
    topk_group: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> expert_index [T, k] int32, expert_weight [T, k] float32; see `RouterSpec`."""
    spec = RouterSpec(top_k, scoring, bool(renormalize), epsilon, scale, n_group, topk_group, group_score)
    added, factors = (None if given is None else given.detach().numpy() for given in (bias, expert_scale))
    chosen = arithmetic().chosen
    if chosen is not None:
        return torch.from_numpy(chosen.copy()), torch.from_numpy(weigh(logits.numpy(), chosen, spec, factors))
    index, weight = route(logits.numpy(), spec, added, factors)
    return torch.from_numpy(index), torch.from_numpy(weight)


@router.register_fake
def _(
    logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, top_k: int, *_: object
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty((rows, top_k), dtype=torch.int32), logits.new_empty((rows, top_k))


@torch.library.custom_op("moevlm::experts", mutates_args=())
def experts(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: int,
    weight_on: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """x [T, H] -> y [T, H] through the chosen experts; see `ExpertsSpec`."""
    spec = ExpertsSpec(activation, bool(gated), weight_on, alpha, limit)
    group_size = arithmetic().group_size

    def through(rows: np.ndarray) -> np.ndarray:
        return rounded(rows, group_size) if group_size else rows

    routing, weights = (expert_index.numpy(), expert_weight.numpy()), (gate_up.detach().numpy(), down.detach().numpy())
    biases = (None if bias is None else bias.detach().numpy() for bias in (gate_up_bias, down_bias))
    up_bias, out_bias = biases
    y = reference_experts(through(x.numpy()), *routing, *weights, spec, up_bias, out_bias, between=through)
    return torch.from_numpy(y)


@experts.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("moevlm::paged_attention", mutates_args=())
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    query_start: Tensor,
    context_len: Tensor,
    page_table: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    sinks: Tensor | None,
    visible_end: Tensor | None,
    heads: int,
    kv_heads: int,
    rotary_dim: int,
    rotary_start: int,
    scale: float,
    window: int,
    softcap: float,
    value_in_key: int,
    value_dim: int,
    epsilon: float,
    value_is_key: int,
    value_norm: int,
    chunk: int,
) -> list[Tensor]:
    """y [T, heads * Dv], then the caches with this step's tokens; see `plugins.ops.attention` and `AttentionSpec`."""
    spec = AttentionSpec(
        *(heads, kv_heads, rotary_dim, rotary_start, scale, window, softcap),
        *(bool(value_in_key), value_dim, epsilon, bool(value_is_key), bool(value_norm), chunk),
    )
    tensors = {
        **{"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "key_cache": key_cache, "value_cache": value_cache},
        **{"query_start": query_start, "context_len": context_len, "page_table": page_table},
        **{"q_norm": q_norm, "k_norm": k_norm, "sinks": sinks, "visible_end": visible_end},
    }
    arrays: Any = {name: None if tensor is None else tensor.detach().numpy() for name, tensor in tensors.items()}
    int8 = arithmetic().int8_cache

    def stored(rows: np.ndarray) -> np.ndarray:
        return rounded(rows, rows.shape[-1]) if int8 else rows

    made = attention(**arrays, spec=spec, stored=stored)
    return [torch.from_numpy(array) for array in made if array is not None]


@paged_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    *others: Any,
) -> list[Tensor]:
    heads, value_dim = others[7], others[15]
    width = value_dim if value_cache is None else value_cache.shape[-1]
    caches = [torch.empty_like(cache) for cache in (key_cache, value_cache) if cache is not None]
    return [q.new_empty((q.shape[0], heads * width)), *caches]


@torch.library.custom_op("moevlm::segment_attention", mutates_args=())
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, image_start: Tensor, heads: int
) -> Tensor:
    """Attention among the patches of each image; see `plugins.ops.attention.segment_attention`."""
    turn = [None if table is None else table.detach().numpy() for table in (cos, sin)]
    rows = [tensor.detach().numpy() for tensor in (q, k, v)]
    y = reference_segment_attention(rows[0], rows[1], rows[2], turn[0], turn[1], image_start.numpy(), heads)
    return torch.from_numpy(y)


@segment_attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("moevlm::cross_attention", mutates_args=())
def cross_attention(q: Tensor, k: Tensor, v: Tensor, image_start: Tensor, heads: int) -> Tensor:
    """Queries to the patches of each image; see `plugins.ops.attention.cross_attention`."""
    rows = [tensor.detach().numpy() for tensor in (q, k, v, image_start)]
    return torch.from_numpy(reference_cross_attention(rows[0], rows[1], rows[2], rows[3], heads))


@cross_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, image_start: Tensor, heads: int) -> Tensor:
    return q.new_empty((image_start.shape[0] - 1, *q.shape))


_taps: ContextVar[dict[str, Tensor] | None] = ContextVar("taps", default=None)


@contextmanager
def recorded_taps() -> Iterator[dict[str, Tensor]]:
    """Every tapped value by its name, while modules run in the block."""
    values: dict[str, Tensor] = {}
    token = _taps.set(values)
    try:
        yield values
    finally:
        _taps.reset(token)


@torch.library.custom_op("moevlm::tap", mutates_args=())
def tap(x: Tensor, name: str) -> Tensor:
    """The identity, so that a value keeps a name in the graph and can be made an output there."""
    x = x.clone()
    values = _taps.get()
    if values is not None:
        values[name] = x
    return x


@tap.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)
