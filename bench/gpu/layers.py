"""The time of MoE layers as real models have them, from 1 to 4096 tokens, against grouped_mm and the GPU's limits.

Ours is the machine code that an engine carries. Each time is of one call among several with other routing and, where
they are small, other weights, so that these come from memory and not from the cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch

from bench.gpu import grouped_mm
from bench.gpu.driver import CubinRunner, Prepared
from bench.gpu.limits import measure_limits
from bench.gpu.shapes import LAYERS, TOKEN_COUNTS, Layer, Limits, operations, tensor_bytes, weight_bytes
from bench.gpu.timing import median_seconds
from moevlm.plugins.gpu.compiler import compile_program
from moevlm.plugins.gpu.ops.experts import ExpertsOp

# Weights and their groups, the formats that are built most first. fp8 in groups of 128 multiplies fp8 in prefill.
STORED = (("", 32), ("int4", 32), ("fp8", 128), ("int8", 32), ("fp4", 32))
PREFILL_TOKENS = (512, 4096)  # with which weights with fewer bits are timed, beside those of decode
DECODE_TOKENS = 64
TOLERANCE = 2e-2  # between two implementations that both round to 16 bits
SPARE_BYTES = 4 << 30
SETS_BYTES, MOST_SETS = 8 << 30, 16  # of weights that take turns


def routings(tokens: int) -> int:
    """How many routings take turns: enough that few tokens touch many times the cache."""
    return 16 if tokens <= 64 else 4 if tokens <= 512 else 2


def run(sm: int) -> Iterator[dict[str, Any]]:
    """The limits, then an entry per layer, format of weights and number of tokens."""
    torch.manual_seed(0)
    limits = measure_limits()
    yield {"kind": "limits", "bandwidth": limits.bandwidth, "peak": limits.peak}
    for layer in LAYERS:
        for weights, group_size in STORED:
            op = layer.experts_op("bfloat16" if sm >= 80 else "float16", weights, group_size)
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
    stored = weight_sets(op)
    for tokens in TOKEN_COUNTS:
        if op.weights and tokens > DECODE_TOKENS and tokens not in PREFILL_TOKENS:
            continue
        entry = named | {"tokens": tokens}
        try:
            yield entry | _times(layer, op, experts, router, stored, tokens, limits)
        except Exception as error:  # the other sizes are still of interest
            yield entry | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    experts.close()
    router.close()


def weight_sets(op: ExpertsOp) -> list[list[torch.Tensor]]:
    """Weights to take turns with: as many as there is room for, and at least one."""
    size = sum(tensor_bytes(tensor, 0) for tensor in op.inputs)
    torch.cuda.empty_cache()  # or what torch keeps of earlier weights would not count as free
    room = min(SETS_BYTES, torch.cuda.mem_get_info()[0] - SPARE_BYTES)
    return [random_weights(op) for _ in range(max(1, min(MOST_SETS, room // size)))]


def random_weights(op: ExpertsOp, device: str = "cuda") -> list[torch.Tensor]:
    """The op's inputs from gate_up on, of the size of a trained model's."""
    tensors = []
    for tensor in op.inputs[3:]:
        if tensor.dtype == "int8":
            codes = torch.randint(-128, 127, tensor.shape, dtype=torch.int8, device=device)
            # Neither -1 nor 127, which are no numbers in e4m3.
            tensors.append(codes.masked_fill_(codes == -1, 0))
            continue
        value = torch.empty(tensor.shape, dtype=getattr(torch, op.dtype), device=device)
        tensors.append(value.uniform_(5e-4, 1e-3) if tensor.name.endswith("_scale") else value.normal_(std=0.02))
    return tensors


@dataclass(frozen=True)
class Routed:
    """Fresh inputs of a layer: logits [T, E], bias and expert_scale [E], x [T, H], where the router sends it, and the
    weights.
    """

    logits: torch.Tensor
    bias: torch.Tensor | None
    expert_scale: torch.Tensor | None
    x: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    stored: list[torch.Tensor]

    def experts(self) -> list[torch.Tensor]:
        """Inputs of the experts op."""
        return [self.x, self.index.int(), self.weight, *self.stored]

    def router(self) -> list[torch.Tensor]:
        """Inputs of the router op."""
        return [tensor for tensor in (self.logits, self.bias, self.expert_scale) if tensor is not None]


def draw(
    layer: Layer, dtype: str, tokens: int, sets: Sequence[list[torch.Tensor]], device: str = "cuda"
) -> list[Routed]:
    """Inputs to take turns with."""
    found = []
    for number in range(routings(tokens)):
        logits = torch.randn(tokens, layer.experts, device=device)
        bias = 0.1 * torch.randn(layer.experts, device=device) if layer.has_bias else None
        scale = torch.rand(layer.experts, device=device) if layer.has_scale else None
        x = torch.randn(tokens, layer.hidden, device=device, dtype=getattr(torch, dtype))
        index, weight = grouped_mm.route(logits, layer.router, bias, scale)
        found.append(Routed(logits, bias, scale, x, index, weight, sets[number % len(sets)]))
    return found


def _times(
    layer: Layer,
    op: ExpertsOp,
    experts: CubinRunner,
    router: CubinRunner,
    sets: Sequence[list[torch.Tensor]],
    tokens: int,
    limits: Limits,
) -> dict[str, Any]:
    routed = draw(layer, op.dtype, tokens, sets)
    ours = [experts.prepare(inputs.experts()) for inputs in routed]
    seconds = median_seconds(ours)
    active = mean(inputs.index.unique().numel() for inputs in routed)
    entry = {
        "experts_seconds": seconds,
        "router_seconds": median_seconds([router.prepare(inputs.router()) for inputs in routed]),
        "active": active,
        "bytes": weight_bytes(op, 1) * active,
        "operations": operations(op, tokens),
    }
    entry["of_bandwidth"] = limits.of_bandwidth(entry["bytes"], seconds)
    entry["of_peak"] = limits.of_peak(entry["operations"], seconds)
    if op.weights or torch.cuda.get_device_capability() < (8, 0):  # grouped_mm has neither
        return entry
    try:
        return entry | _peer(layer, op, routed, ours[0])
    except Exception as error:  # our own times stand
        return entry | {"error": f"grouped_mm: {type(error).__name__}: {error}".splitlines()[0]}


def _peer(layer: Layer, op: ExpertsOp, routed: Sequence[Routed], ours: Prepared) -> dict[str, Any]:
    """The peer's times. Raises ValueError if its result is another than ours."""

    def experts(inputs: Routed) -> torch.Tensor:
        weight = inputs.weight.to(inputs.x.dtype)
        return grouped_mm.experts(inputs.x, inputs.index, weight, *inputs.stored, op.spec.activation)

    def router(inputs: Routed) -> tuple[torch.Tensor, torch.Tensor]:
        return grouped_mm.route(inputs.logits, layer.router, inputs.bias, inputs.expert_scale)

    difference = relative_norm(ours.outputs[0], experts(routed[0]))
    if not difference <= TOLERANCE:
        raise ValueError(f"ours and grouped_mm differ by {difference:.2g} (allowed: up to {TOLERANCE:g})")
    return {
        "peer_experts_seconds": median_seconds([partial(experts, inputs) for inputs in routed]),
        "peer_router_seconds": median_seconds([partial(router, inputs) for inputs in routed]),
        "difference": difference,
    }


def relative_norm(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference over that of what is expected."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())
