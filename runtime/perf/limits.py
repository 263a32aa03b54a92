"""The physical limit of each stage: the bytes that must be read and the multiplications that must be done."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moevlm.runtime.core.manifest import CACHE_BYTES, SCALE_BYTES, CostMetadata, EngineMetadata, ModelMetadata
from moevlm.runtime.perf.latency_report import Limit
from moevlm.runtime.perf.machine import GpuMachine, Machine


@dataclass(frozen=True)
class Work:
    """bytes: read from memory. weight_macs, attention_macs: multiply-adds."""

    bytes: float
    weight_macs: float
    attention_macs: float

    @property
    def flops(self) -> float:
        return 2 * (self.weight_macs + self.attention_macs)


def vision_work(cost: CostMetadata, patches: list[int]) -> Work:
    """patches: of each image."""
    pairs = sum(n * n for n in patches)
    return Work(cost.vision_bytes, sum(patches) * cost.patch_macs, pairs * cost.patch_pair_macs)


def prefill_work(model: ModelMetadata, cost: CostMetadata, tokens: int) -> Work:
    """A prompt of `tokens` in one pass, logits of the last position."""
    active = model.top_k * cost.expert_macs + cost.dense_macs
    return Work(
        cost.dense_bytes + cost.head_bytes + _experts_read(model, tokens) * cost.expert_bytes,
        tokens * active + cost.head_macs,
        _attention(model, tokens * (tokens + 1) / 2),
    )


def decode_work(model: ModelMetadata, engine: EngineMetadata, cost: CostMetadata, context: int, batch: int = 1) -> Work:
    """One more token for each of `batch` sequences that have `context` tokens already."""
    active = model.top_k * cost.expert_macs + cost.dense_macs + cost.head_macs
    cached = cache_bytes_per_token(model, engine) * context
    weights = cost.dense_bytes + cost.head_bytes + _experts_read(model, batch) * cost.expert_bytes
    return Work(weights + batch * cached, batch * active, batch * _attention(model, context + 1))


def limit(work: Work, machine: Machine | GpuMachine, engine: EngineMetadata, seconds: float) -> Limit:
    """How long `work` takes at least, and how near `seconds` came to it. Quantized weights are multiplied as bytes.

    How fast a GPU multiplies is not known: only its memory counts.
    """
    if isinstance(machine, GpuMachine):
        memory, arithmetic = work.bytes / machine.copied, 0.0
    else:
        products = machine.float32 if engine.block_size == 0 else machine.int8
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


def cache_bytes_per_token(model: ModelMetadata, engine: EngineMetadata) -> int:
    """Keys and values of all layers, with the scales of an int8 cache."""
    scale = SCALE_BYTES if engine.kv_cache == "int8" else 0
    width = CACHE_BYTES[engine.kv_cache] * model.head_dim + scale
    return 2 * model.layers * model.kv_heads * width


def _experts_read(model: ModelMetadata, tokens: int) -> float:
    """How many of a layer's experts `tokens` random tokens need, on average."""
    if not model.experts:
        return 0
    return float(model.experts * (1 - np.power(1 - model.top_k / model.experts, tokens)))


def _attention(model: ModelMetadata, pairs: float) -> float:
    """Multiply-adds of `pairs` of a query and a key: the score, and the weighted value."""
    return 2 * pairs * model.layers * model.heads * model.head_dim
