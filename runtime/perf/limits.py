"""The physical limit of each stage: the bytes that must be read and the multiplications that must be done."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moevlm.runtime.core.engine_metadata import CostMetadata, EngineMetadata
from moevlm.runtime.core.manifest import LayerMetadata, ModelMetadata
from moevlm.runtime.core.states import PagedKV, StateSpec
from moevlm.runtime.perf.latency_report import Limit
from moevlm.runtime.perf.machine import GpuMachine, Machine


@dataclass(frozen=True)
class Work:
    """bytes: between memory and processor. weight_macs, attention_macs: multiply-adds; attention's with states, too."""

    bytes: float
    weight_macs: float
    attention_macs: float

    @property
    def flops(self) -> float:
        return 2 * (self.weight_macs + self.attention_macs)


def vision_work(cost: CostMetadata, patches: list[int]) -> Work:
    """patches: of each image."""
    pairs = sum(n * n for n in patches)
    weights = sum(patches) * cost.patch_macs + len(patches) * cost.image_macs
    return Work(cost.vision_bytes, weights, pairs * cost.patch_pair_macs)


def prefill_work(model: ModelMetadata, cost: CostMetadata, tokens: int) -> Work:
    """A prompt of `tokens` in one pass, logits of the last position."""
    active = _experts_used(model) * cost.expert_macs + cost.dense_macs
    return Work(
        cost.dense_bytes + cost.head_bytes + experts_read(model, tokens) * cost.expert_bytes,
        tokens * active + cost.head_macs,
        tokens * cost.state_macs + sum(_pair_macs(n) * _causal_pairs(tokens, n) for n in model.layers),
    )


def decode_work(model: ModelMetadata, engine: EngineMetadata, cost: CostMetadata, context: int, batch: int = 1) -> Work:
    """One more token for each of `batch` sequences that have `context` tokens already."""
    active = _experts_used(model) * cost.expert_macs + cost.dense_macs + cost.head_macs
    cached = sum(_state_bytes(state, context) for state in engine.states)
    attention = cost.state_macs + sum(_pair_macs(n) * _seen(context + 1, n) for n in model.layers)
    weights = cost.dense_bytes + cost.head_bytes + experts_read(model, batch) * cost.expert_bytes
    return Work(weights + batch * cached, batch * active, batch * attention)


def limit(work: Work, machine: Machine | GpuMachine, engine: EngineMetadata, seconds: float) -> Limit:
    """How long `work` takes at least, and how near `seconds` came to it. Quantized weights are multiplied as bytes.

    How fast a GPU multiplies is not known: only its memory counts.
    """
    if isinstance(machine, GpuMachine):
        memory, arithmetic = work.bytes / machine.copied, 0.0
    else:
        products = machine.float32 if engine.group_size == 0 else machine.int8
        arithmetic = work.weight_macs / products + work.attention_macs / machine.float32
        memory = work.bytes / machine.read
    least = max(memory, arithmetic)
    return Limit(
        bytes=round(work.bytes),
        flops=round(work.flops),
        seconds=least,
        bound="memory" if memory >= arithmetic else "arithmetic",
        fraction=least / seconds,
    )


def cache_bytes_per_token(engine: EngineMetadata) -> int:
    """Keys and values of all layers, with the scales of an int8 cache."""
    return sum(state.token_bytes for state in engine.states if isinstance(state, PagedKV))


def _state_bytes(state: StateSpec, context: int) -> int:
    """Bytes of a layer's state that one more token reads, and writes if it is recurrent."""
    if isinstance(state, PagedKV):
        return state.token_bytes * (_seen(context + 1, state) - 1)
    return 2 * state.row_bytes


def _experts_used(model: ModelMetadata) -> float:
    """Experts of a sparse layer that a token is sent to, on average."""
    return float(np.mean([layer.top_k for layer in model.layers if layer.experts] or [0]))


def experts_read(model: ModelMetadata, tokens: int) -> float:
    """How many of a sparse layer's experts `tokens` random tokens need, on average."""
    sparse = [layer for layer in model.layers if layer.experts]
    return float(np.mean([n.experts * (1 - np.power(1 - n.top_k / n.experts, tokens)) for n in sparse] or [0]))


def _pair_macs(layer: LayerMetadata) -> int:
    """Multiply-adds of a query and a key in all heads: the score, and the weighted value."""
    return layer.heads * (layer.key_dim + layer.value_dim)


def _seen(tokens: int, layer: LayerMetadata | PagedKV) -> int:
    """Of `tokens` up to a query, itself included, those that it sees."""
    if layer.chunk:
        tokens = (tokens - 1) % layer.chunk + 1
    return min(tokens, layer.window) if layer.window else tokens


def _causal_pairs(tokens: int, layer: LayerMetadata) -> float:
    """Pairs of a query and a key that it sees, in a prompt."""
    chunks, rest = divmod(tokens, layer.chunk or tokens or 1)
    return chunks * _pairs_of_chunk(layer.chunk or tokens, layer.window) + _pairs_of_chunk(rest, layer.window)


def _pairs_of_chunk(tokens: int, window: int) -> float:
    full = min(tokens, window) if window else tokens
    return full * (full + 1) / 2 + (tokens - full) * full
