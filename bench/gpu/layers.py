"""The time of MoE layers as real models have them, from 1 to 4096 tokens, against grouped_mm and the GPU's limits.

Ours is the machine code that an engine carries. Each time is of one call among several with different routing, so that
weights come from memory and not from the cache.
"""

from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import torch

from bench.gpu import grouped_mm
from bench.gpu.driver import CubinRunner
from bench.gpu.limits import measure_limits
from bench.gpu.shapes import LAYERS, TOKEN_COUNTS, Layer, Limits, operations, tensor_bytes, weight_bytes
from bench.gpu.timing import median_seconds
from moevlm.plugins.gpu.compiler import compile_program
from moevlm.plugins.gpu.ops import ExpertsOp

FORMATS = ("", "int8", "int4", "fp8")
DECODE_TOKENS = 64  # up to which weights with fewer bits are timed
TOLERANCE = 2e-2  # between two implementations that both round to 16 bits
SPARE_BYTES = 4 << 30


def routings(tokens: int) -> int:
    """How many routings take turns: enough that few tokens touch many times the cache."""
    return 16 if tokens <= 64 else 4 if tokens <= 512 else 2


def run(sm: int) -> Iterator[dict[str, Any]]:
    """The limits, then an entry per layer, format of weights and number of tokens."""
    torch.manual_seed(0)
    limits = measure_limits()
    yield {"kind": "limits", "bandwidth": limits.bandwidth, "peak": limits.peak}
    for layer in LAYERS:
        for weights in FORMATS:
            op = layer.experts_op("bfloat16" if sm >= 80 else "float16", weights)
            yield from measure(layer, op, sm, limits)
            torch.cuda.empty_cache()


def measure(layer: Layer, op: ExpertsOp, sm: int, limits: Limits) -> Iterator[dict[str, Any]]:
    """Entries of one layer with one format of weights."""
    needed = sum(tensor_bytes(tensor, 0) for tensor in op.inputs) + SPARE_BYTES
    free = torch.cuda.mem_get_info()[0]
    named = {"kind": "layer", "layer": layer.name, "weights": op.weights or op.dtype}
    if needed > free:
        yield named | {"skipped": f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"}
        return
    experts = CubinRunner(compile_program(op, [sm]), sm)
    router = CubinRunner(compile_program(layer.router_op, [sm]), sm)
    stored = random_weights(op)
    for tokens in TOKEN_COUNTS:
        if op.weights and tokens > DECODE_TOKENS:
            break
        entry = named | {"tokens": tokens}
        try:
            yield entry | _times(layer, op, experts, router, stored, tokens, limits)
        except Exception as error:  # the other sizes are still of interest
            yield entry | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    experts.close()
    router.close()


def random_weights(op: ExpertsOp) -> list[torch.Tensor]:
    """The op's inputs from gate_up on, of the size of a trained model's."""
    tensors = []
    for tensor in op.inputs[3:]:
        if tensor.dtype == "int8":
            tensors.append(torch.randint(-128, 128, tensor.shape, dtype=torch.int8, device="cuda"))
            continue
        value = torch.empty(tensor.shape, dtype=getattr(torch, op.dtype), device="cuda")
        tensors.append(value.uniform_(5e-4, 1e-3) if tensor.name.endswith("_scale") else value.normal_(std=0.02))
    return tensors


def _times(
    layer: Layer,
    op: ExpertsOp,
    experts: CubinRunner,
    router: CubinRunner,
    stored: list[torch.Tensor],
    tokens: int,
    limits: Limits,
) -> dict[str, Any]:
    dtype = getattr(torch, op.dtype)
    bias = 0.1 * torch.randn(op.experts, device="cuda") if layer.has_bias else None
    active: list[int] = []
    calls: dict[str, list[Callable[[], object]]] = {"experts": [], "router": [], "peer_experts": [], "peer_router": []}
    results: tuple[torch.Tensor, torch.Tensor] | None = None
    for _ in range(routings(tokens)):
        logits = torch.randn(tokens, op.experts, device="cuda")
        x = torch.randn(tokens, op.hidden, device="cuda", dtype=dtype)
        index, weight = grouped_mm.route(logits, layer.router, bias)
        active.append(index.unique().numel())
        ours = experts.prepare([x, index.int(), weight, *stored], tokens)
        calls["experts"].append(ours)
        calls["router"].append(router.prepare([logits] if bias is None else [logits, bias], tokens))
        if op.weights:
            continue
        arguments = (x, index, weight.to(dtype), *stored, op.spec.activation)
        calls["peer_experts"].append(lambda arguments=arguments: grouped_mm.experts(*arguments))
        calls["peer_router"].append(lambda logits=logits: grouped_mm.route(logits, layer.router, bias))
        if results is None:
            ours()
            results = ours.outputs[0], grouped_mm.experts(*arguments)
    seconds = {f"{name}_seconds": median_seconds(timed) for name, timed in calls.items() if timed}
    least = mean(limits.seconds(op, tokens, count) for count in active)
    entry = seconds | {
        "active": mean(active),
        "bytes": mean(weight_bytes(op, count) for count in active),
        "operations": operations(op, tokens),
        "bound": limits.bound(op, tokens, round(mean(active))),
        "fraction": least / seconds["experts_seconds"],
    }
    if results is not None:
        entry["peer_fraction"] = least / seconds["peer_experts_seconds"]
        difference = relative_norm(*results)
        if not difference <= TOLERANCE:
            raise ValueError(f"ours and grouped_mm differ by {difference:.2g} (allowed: up to {TOLERANCE:g})")
        entry["difference"] = difference
    return entry


def relative_norm(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference over that of what is expected."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())
