"""Experts whose weights stay in the host's memory, as `--experts-in host` has them, against the GPU's link to it."""

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch

from bench.gpu.device import Device
from bench.gpu.layers import draw, random_weights
from bench.gpu.mapped import MappedMemory
from bench.gpu.shapes import LAYERS, Layer, weight_bytes

LAYER = LAYERS[0]
WEIGHTS = ("int4", "")  # formats, the one that is for such machines first
TOKENS = (1, 8, 64, 2048)
COPY_BYTES = 1 << 30


def run(sm: int) -> Iterator[dict[str, Any]]:
    """The link, then an entry per format of weights and number of tokens."""
    torch.manual_seed(0)
    device, memory = Device(sm), MappedMemory()
    try:
        link = copied(device, memory, COPY_BYTES)
        yield {"kind": "link", "bytes_per_second": link}
        for weights in WEIGHTS:
            yield from measure(LAYER, weights, TOKENS, device, memory, link)
    finally:
        memory.close()


def copied(device: Device, memory: MappedMemory, size: int) -> float:
    """Bytes per second of a copy from such memory to the GPU's own."""
    source = memory.copy(torch.ones(size, dtype=torch.uint8))
    target = torch.empty(size, dtype=torch.uint8, device=device.name)
    return size / device.seconds([lambda: memory.upload(source, target, device.stream)])


def measure(
    layer: Layer, weights: str, tokens: tuple[int, ...], device: Device, memory: MappedMemory, link: float
) -> Iterator[dict[str, Any]]:
    """Times with the same weights on the host and on the device; what both compute must have the same bits."""
    op = layer.experts_op(device.dtype, weights)
    here = random_weights(op, device.name)
    there = [memory.copy(tensor) for tensor in here]
    runner = device.runner(op)
    for count in tokens:
        entry: dict[str, Any] = {"kind": "host_experts", "layer": layer.name, "weights": weights or op.dtype}
        entry["tokens"] = count
        routed = [draw(layer, op.dtype, count, [stored], device.name) for stored in (there, here)]
        calls = [[runner.prepare(inputs.experts()) for inputs in each] for each in routed]
        same = _run_both(device, calls[0][0], runner.prepare([*routed[0][0].experts()[:3], *here]))
        seconds, on_device = (device.seconds(each) for each in calls)
        size = weight_bytes(op, 1) * mean(inputs.index.unique().numel() for inputs in routed[0])
        entry |= {"seconds": seconds, "device_seconds": on_device, "bytes": size, "of_link": size / seconds / link}
        yield entry if same else entry | {"error": "other bits than with weights on the device"}
    runner.close()


def _run_both(device: Device, *calls: Any) -> bool:
    """Whether two calls give the same bits."""
    for call in calls:
        call()
    device.wait()
    first, second = (call.outputs[0] for call in calls)
    return torch.equal(first, second)
