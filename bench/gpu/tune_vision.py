"""The best tile of attention among patches for each size of head, as data for `plugins/gpu/tiles.json`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch

from bench.gpu.device import Device
from bench.gpu.vision import draw
from moevlm.plugins.gpu import tiles
from moevlm.plugins.gpu.compiler import compile_drafts
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp

HEADS = {"80": (16, 72), "128": (16, 128), "256": (8, 256)}  # columns of a padded head -> heads, and their dimensions
PATCHES = 8160  # of one photo
CANDIDATES = [list(tile) for tile in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))]


def run(sm: int) -> Iterator[dict[str, Any]]:
    """An entry per size of head, then the table of them all."""
    torch.manual_seed(0)
    yield from measure(Device(sm), HEADS, PATCHES, CANDIDATES)


def measure(
    device: Device, heads: Mapping[str, tuple[int, int]], patches: int, candidates: Sequence[list[int]]
) -> Iterator[dict[str, Any]]:
    """The tile in use is a candidate, too."""
    family = tiles.FAMILIES[device.sm]
    used: dict[str, list[int]] = tiles.table()[family]["segments"]["16"]
    for columns, shape in heads.items():
        op, before = SegmentAttentionOp(*shape, device.dtype), used[columns]
        inputs, _ = draw(op, 1, patches, device.name)
        seconds: dict[tuple[int, ...], float] = {}
        for tile in _compiled(op, device.sm, used, columns, [before, *candidates]):
            used[columns] = tile
            runner = device.runner(op)
            seconds[tuple(tile)] = device.seconds([runner.prepare(inputs)])
            runner.close()
        used[columns] = list(min(seconds, key=seconds.__getitem__))
        times = {"seconds": seconds[tuple(used[columns])], "seconds_before": seconds[tuple(before)]}
        yield {"kind": "tile", "columns": columns, "tile": used[columns], "before": before, **times}
    yield {"kind": "tiles", "family": family, "table": {"segments": {"16": used}}}


def _compiled(
    op: SegmentAttentionOp, sm: int, used: dict[str, list[int]], columns: str, candidates: Sequence[list[int]]
) -> list[list[int]]:
    """Those that fit the GPU. Their kernels are compiled, several at a time."""
    drafts = []
    for tile in candidates:
        used[columns] = tile
        drafts.append(op.draft(sm))

    def fits(draft: Draft) -> bool:
        try:
            return bool(compile_drafts([draft]))
        except ValueError:  # too much shared memory, mostly
            return False

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [tile for tile, fit in zip(candidates, pool.map(fits, drafts), strict=True) if fit]
