"""The time of paged attention: decode of 1 to 64 sequences over 512 to 128k tokens, and prefill of 2k to 32k.

Ours is the machine code that an engine carries, norms, rotation and the writing of keys and values included. Against
the GPU's limits, and against the best that PyTorch has for the same keys and values where they are contiguous.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.gpu.attention_inputs import GEMMA4, QWEN35, QWEN_30B, QWEN_235B, Model, cached, draw, queries
from bench.gpu.device import Device, Runner
from bench.gpu.layers import relative_norm
from bench.gpu.limits import measure_limits
from bench.gpu.shapes import Limits
from bench.gpu.torch_attention import flex, fused
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.runtime.core.dtypes import DTYPES

TOLERANCE = 2e-2  # between two implementations that both round to 16 bits
SETS_BYTES, MOST_SETS = 512 << 20, 16  # of caches that take turns, so that keys come from memory
SPARE_BYTES = 4 << 30


@dataclass(frozen=True)
class Point:
    """One measurement: `sequences` with `past` tokens each and `tokens` new ones. cache: as PagedAttentionOp names it.

    flex: whether to compile flex_attention for it, too.
    """

    model: Model
    cache: str
    sequences: int
    past: int
    tokens: int = 1
    flex: bool = False


PAST = (512, 4096, 32768, 131072)
# The most telling first: a machine may be lent for minutes.
POINTS = (
    *(Point(QWEN_30B, "", n, past) for n in (1, 8, 64) for past in PAST),
    *(Point(QWEN_30B, "", 1, 0, tokens) for tokens in (2048, 8192, 32768)),
    Point(QWEN_30B, "", 1, 30720, 2048),
    *(Point(QWEN_30B, cache, n, past) for cache in ("int8", "fp8") for n in (1, 8, 64) for past in PAST),
    *(Point(model, "", n, past) for model in (QWEN35, GEMMA4) for n in (1, 8) for past in (4096, 32768)),
    *(Point(model, "", 1, 0, 8192) for model in (QWEN35, GEMMA4)),
    *(Point(QWEN_235B, "", n, past) for n in (1, 64) for past in (4096, 32768)),
    *(Point(QWEN_30B, cache, 1, 0, 8192) for cache in ("int8", "fp8")),
    Point(QWEN_30B, "", 1, 4096, flex=True),
    Point(QWEN_30B, "", 64, 4096, flex=True),
    Point(QWEN_30B, "", 1, 0, 8192, flex=True),
    *(Point(QWEN_30B, "", n, past) for n in (2, 4, 16, 32) for past in PAST),
)


def run(sm: int) -> Iterator[dict[str, Any]]:
    """The limits, then an entry per point."""
    torch.manual_seed(0)
    device, limits = Device(sm), measure_limits()
    yield {"kind": "limits", "bandwidth": limits.bandwidth, "peak": limits.peak}
    runners: dict[PagedAttentionOp, Runner] = {}
    for point in POINTS:
        op = point.model.op(device.dtype, point.cache)
        if op not in runners:
            runners[op] = device.runner(op)
        yield measure(point, op, runners[op], device, limits)


def measure(point: Point, op: PagedAttentionOp, runner: Runner, device: Device, limits: Limits) -> dict[str, Any]:
    """One point. A peer that fails is left out."""
    entry: dict[str, Any] = {"kind": "attention", "model": point.model.name, "cache": point.cache or op.dtype}
    entry |= {"sequences": point.sequences, "past": point.past, "tokens": point.tokens}
    size = cache_bytes(op, point)
    needed = size * (1 if point.cache else 3) + SPARE_BYTES  # the peer's copies
    if (free := device.free) < needed:
        return entry | {"skipped": f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"}
    sets = max(1, min(MOST_SETS, -(-SETS_BYTES // size), (free - SPARE_BYTES) // (3 * size)))
    lengths = [(point.past, point.tokens)] * point.sequences
    try:
        drawn = [draw(op, lengths, device.name) for _ in range(sets)]
        calls = [runner.prepare(list(inputs.values())) for inputs in drawn]
        seconds = device.seconds(calls)
        work = operations(op, point)
        entry |= {"seconds": seconds, "bytes": size, "operations": work}
        entry |= {"of_bandwidth": limits.of_bandwidth(size, seconds), "of_peak": limits.of_peak(work, seconds)}
        return entry if point.cache else entry | _peers(point, op, drawn, calls[0], device)
    except Exception as error:  # the other points are still of interest
        return entry | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def cache_bytes(op: PagedAttentionOp, point: Point) -> int:
    """Of keys and values that the step reads."""
    widths = sum(tensor.shape[-1] * DTYPES[tensor.dtype].bytes for tensor in op.inputs if tensor.written)
    return point.sequences * (point.past + point.tokens) * op.spec.kv_heads * widths


def operations(op: PagedAttentionOp, point: Point) -> int:
    """Floating-point operations of both products, 2 for each query, key and dimension of a head."""
    pairs = point.tokens * point.past + point.tokens * (point.tokens + 1) // 2
    return 2 * point.sequences * pairs * op.spec.heads * (op.key_dim + op.value_dim)


def _peers(
    point: Point, op: PagedAttentionOp, drawn: Sequence[dict[str, torch.Tensor]], ours: Any, device: Device
) -> dict[str, Any]:
    """The fastest of PyTorch's, and how far ours is from it. Raises ValueError if they differ, or if none runs."""
    ours()
    device.wait()
    given = [_contiguous(point, op, inputs) for inputs in drawn]
    found: dict[str, float] = {}
    why: list[str] = []
    entry: dict[str, Any] = {}
    kernels = [*fused(), *((("flex", flex(device.name == "cuda")),) if point.flex else ())]
    for name, attend in kernels:
        try:
            expected = attend(*given[0]).transpose(1, 2).flatten(2).flatten(0, 1)
            found[name] = device.seconds([partial(attend, *tensors) for tensors in given])
        except Exception as error:
            why.append(f"{name}: {' '.join(str(error).split())[:80]}")
            continue
        if "difference" not in entry:
            entry["difference"] = relative_norm(ours.outputs[0], expected)
    if not found:
        raise ValueError(f"no kernel of PyTorch runs: {'; '.join(why)}")
    if not entry["difference"] <= TOLERANCE:
        raise ValueError(f"ours and PyTorch's differ by {entry['difference']:.2g} (allowed: up to {TOLERANCE:g})")
    best = min(found, key=found.__getitem__)
    return entry | {"peer": best, "peer_seconds": found[best], "peers_seconds": found}


def _contiguous(point: Point, op: PagedAttentionOp, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """q, k and v as PyTorch takes them, after a step has written its keys and values."""
    caches = (inputs["key_cache"], inputs["value_cache"])
    total = point.past + point.tokens
    return queries(op, inputs, point.tokens), *(cached(cache, inputs["page_table"], total) for cache in caches)
