"""The time of the gated delta rule: decode of 1 to 64 sequences, prompts, and both in one step.

Ours is the machine code that an engine carries, the convolution included, against the GPU's limits: reading and writing
states, and the operations of chunks. PyTorch has no such operator.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.device import Device
from bench.gpu.limits import measure_limits
from bench.gpu.shapes import Limits
from moevlm.plugins.gpu.ops.gated_delta import GatedDeltaOp
from moevlm.plugins.gpu.tiles import delta_tiles
from moevlm.plugins.ops.spec import GatedDeltaSpec
from moevlm.runtime.core.dtypes import DTYPES

QWEN = GatedDeltaSpec(key_heads=16, value_heads=32, key_dim=128, value_dim=128, kernel=4)  # Qwen3.5-35B-A3B
SETS_BYTES, MOST_SETS = 512 << 20, 16  # of states that take turns, so that they come from memory


@dataclass(frozen=True)
class Point:
    """So many sequences of one token, and so many prompts of so many tokens, in one step."""

    decoded: int
    prompts: int = 0
    tokens: int = 0

    @property
    def lengths(self) -> list[int]:
        return self.decoded * [1] + self.prompts * [self.tokens]


# The most telling first: a machine may be lent for minutes.
POINTS = (
    *(Point(n) for n in (1, 8, 64)),
    *(Point(0, 1, tokens) for tokens in (2048, 512, 64, 8192)),
    Point(63, 1, 2048),
    Point(0, 8, 256),
    *(Point(n) for n in (2, 4, 16, 32)),
)


def run(sm: int) -> Iterator[dict[str, Any]]:
    """The limits, then an entry per point."""
    torch.manual_seed(0)
    device, limits = Device(sm), measure_limits()
    yield {"kind": "limits", "bandwidth": limits.bandwidth, "peak": limits.peak}
    yield from measure(GatedDeltaOp(QWEN, device.dtype), POINTS, device, limits)


def measure(op: GatedDeltaOp, points: tuple[Point, ...], device: Device, limits: Limits) -> Iterator[dict[str, Any]]:
    runner = device.runner(op)
    for point in points:
        entry = {"kind": "delta", "decoded": point.decoded, "prompts": point.prompts, "tokens": point.tokens}
        size, work = step_bytes(op, point), operations(op, point, device.sm)
        sets = max(1, min(MOST_SETS, SETS_BYTES // size))
        try:
            calls = [runner.prepare(draw(op, point.lengths, device.name)) for _ in range(sets)]
            seconds = device.seconds(calls)
        except Exception as error:  # the other points are still of interest
            yield entry | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        entry |= {"seconds": seconds, "bytes": size, "operations": work}
        entry["finite"] = bool(calls[0].outputs[0].isfinite().all())
        if not entry["finite"]:
            entry["error"] = "y has values that are no numbers"
        yield entry | {"of_bandwidth": limits.of_bandwidth(size, seconds), "of_peak": limits.of_peak(work, seconds)}
    runner.close()


def draw(op: GatedDeltaOp, lengths: list[int], device: str) -> list[torch.Tensor]:
    """Inputs in the op's order; decays as trained models have them, of 0.5 to nearly 1."""
    sizes = {"T": sum(lengths), "N": len(lengths), "P": len(lengths) + 1}
    given = {
        "rate": torch.empty(op.spec.value_heads).uniform_(0.01, 1),
        "query_start": torch.tensor([0, *lengths]).cumsum(0).int(),
        "state_row": 1 + torch.randperm(len(lengths), dtype=torch.int32),
    }
    found = []
    for tensor in op.inputs:
        value = given.get(tensor.name)
        if value is None:
            value = torch.randn(tensor.at(sizes), device=device, dtype=getattr(torch, tensor.dtype))
        found.append(value.to(device))
    return found


def step_bytes(op: GatedDeltaOp, point: Point) -> int:
    """Of states, read and written, of the inputs and of y."""
    spec = op.spec
    kept = spec.value_heads * spec.key_dim * spec.value_dim + (spec.kernel - 1) * spec.channels
    row = spec.channels + 2 * spec.value_heads + spec.value_heads * spec.value_dim
    return len(point.lengths) * 2 * 4 * kept + sum(point.lengths) * row * DTYPES[op.dtype].bytes


def operations(op: GatedDeltaOp, point: Point, sm: int) -> int:
    """Floating-point operations of all matrix products of chunks, 2 for each multiplication."""
    spec = op.spec
    keys, values = spec.key_dim, spec.value_dim
    chunk = delta_tiles(DTYPES[op.dtype].bits, max(keys, values), sm).chunk
    within = 2 * chunk * keys + chunk * (keys + values)  # scores, likenesses; U and W
    carried = 3 * keys * values + chunk * values
    return 2 * point.prompts * point.tokens * spec.value_heads * (within + carried)
