"""The best tile for each range of tokens on this GPU, as data for `plugins/gpu/tiles.json`.

Every candidate is compiled and timed in the whole op, first for gate_up, then, with the best of those, for down. The
best is the one with the least product of its times over all layers.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import log
from typing import Any

import torch

from bench.gpu.driver import CubinRunner
from bench.gpu.layers import SPARE_BYTES, draw, weight_sets
from bench.gpu.shapes import LAYERS, Layer, tensor_bytes
from bench.gpu.timing import median_seconds
from moevlm.plugins.gpu import tiles
from moevlm.plugins.gpu.compiler import compile_drafts
from moevlm.plugins.gpu.draft import ADA
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.program import Program

BITS = {"16": "", "8": "int8", "4": "int4", "fp8": "fp8"}
FEW = [[16, *rest] for rest in product((16, 32, 64), (64, 128, 256), (4, 8), (3, 4, 6))]
# Rows of an expert -> rows of a tile that are worth trying.
GROUPED = {4: (16,), 16: (16, 32), 64: (32, 64), 256: (64, 128)}
MANY = list(product((32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)))
# Programs that stay, of GPUs with tensor maps: one to a multiprocessor. They are worth trying from so many rows on.
PROGRAMS, PERSISTENT_ROWS = {"90": 132, "100": 148}, 64
E4M3 = list(product((128, 256), (128,), (4, 8), (2, 3, 4)))  # with activations in e4m3
REPLAYS = 5
Tile = list[int]
Entry = dict[str, Any]


def run(sm: int) -> Iterator[Entry]:
    """An entry per range of tokens with the tiles chosen, then the table of them all."""
    torch.manual_seed(0)
    family = tiles.FAMILIES[sm]
    table = dict(tiles.table()[family])  # float32 is not tuned
    for bits, weights in BITS.items():
        if bits == "fp8" and sm < ADA:
            continue
        tuner = _Tuner(sm, weights, tiles.table()[family][bits])
        chosen: dict[str, Any] = {}
        for name in ("single", "few"):
            chosen[name] = tuner.best(tuner.entry[name], 1 if name == "single" else tiles.FEW_TOKENS // 2, FEW)
            yield {"kind": "tile", "bits": bits, "range": name, **chosen[name]}
            chosen[name].pop("log_seconds")
        chosen["grouped"] = []
        for rows, heights in GROUPED.items():
            options = [
                tuner.best_of_rows(rows, [[height, *rest] for rest in others], fields)
                for height in heights
                for fields, others in _kinds(family, bits, rows)
            ]
            best = min(options, key=lambda option: option["log_seconds"])
            # A tile is chosen for up to the middle, on a logarithmic scale, between its own rows and the next.
            yield {"kind": "tile", "bits": bits, "range": f"{rows} rows", **best}
            best.pop("log_seconds")
            chosen["grouped"].append({"rows": 2 * rows if rows != max(GROUPED) else None, **best})
        table[bits] = chosen
    yield {"kind": "tiles", "family": family, "table": table}


def _kinds(family: str, bits: str, rows: int) -> Iterator[tuple[Entry, Sequence[tuple[int, ...]]]]:
    """The kinds of grouped products to try: fields of their entry in tiles.json, and tiles but for their heights."""
    yield {}, MANY
    if bits == "16" and family in PROGRAMS and rows >= PERSISTENT_ROWS:
        yield {"programs": PROGRAMS[family]}, MANY
    if bits == "fp8":
        yield {"activations": "fp8"}, E4M3


class _Tuner:
    """Times ops of one format of weights. entry: the tiles in use, changed in place for each candidate's plan."""

    def __init__(self, sm: int, weights: str, entry: dict[str, Any]) -> None:
        self.sm, self.entry = sm, entry
        self.ops: list[tuple[Layer, ExpertsOp]] = []
        for layer in LAYERS:
            op = layer.experts_op("bfloat16" if sm >= 80 else "float16", weights)
            needed = sum(tensor_bytes(tensor, 0) for tensor in op.inputs) + SPARE_BYTES
            if needed <= torch.cuda.mem_get_info()[0]:
                self.ops.append((layer, op))

    def best_of_rows(self, rows: int, candidates: Sequence[Tile], fields: Entry) -> Entry:
        """For grouped products with so many rows to an expert. fields: more of the entry, as `_kinds` gives it."""
        first = {"rows": None, "gate_up": list(candidates[0]), "down": list(candidates[0]), **fields}
        self.entry["grouped"] = [first]
        return self.best(first, rows, candidates, per_expert=True) | fields

    def best(self, used: Entry, amount: int, candidates: Sequence[Tile], per_expert: bool = False) -> Entry:
        """The best gate_up and down. amount: tokens, or rows of an expert.

        used: where plans take their tiles from; what it has already is a candidate, too.
        """
        log_seconds = 0.0
        for projection in ("gate_up", "down"):
            seconds = dict.fromkeys(map(tuple, [used[projection], *candidates]), 0.0)
            for layer, op in self.ops:
                tokens = amount * op.experts // op.top_k if per_expert else amount
                taken = self._time(layer, op, tokens, used, projection, list(seconds))
                seconds = {tile: seconds[tile] + log(value) for tile, value in taken.items()}
            if not seconds:
                raise ValueError(f"no tile of {len(candidates)} for {projection} fits this GPU")
            used[projection] = list(min(seconds, key=seconds.__getitem__))
            log_seconds = min(seconds.values())
        return {"gate_up": used["gate_up"], "down": used["down"], "log_seconds": log_seconds}

    def _time(
        self,
        layer: Layer,
        op: ExpertsOp,
        tokens: int,
        used: Entry,
        projection: str,
        candidates: Sequence[tuple[int, ...]],
    ) -> dict[tuple[int, ...], float]:
        """Seconds of the whole op by candidate, those left out that do not fit."""
        drafts = []
        for tile in candidates:
            used[projection] = list(tile)
            drafts.append(op.draft(self.sm, tokens))

        def compiled(number: int) -> Program | None:
            try:
                return compile_drafts([drafts[number]])
            except ValueError:  # too much shared memory, mostly
                return None

        compiled(0)  # and with it the kernels that all of them share
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            programs = list(pool.map(compiled, range(len(drafts))))
        inputs = draw(layer, op.dtype, tokens, weight_sets(op))
        seconds = {}
        for tile, program in zip(candidates, programs, strict=True):
            if program is None:
                continue
            runner = CubinRunner(program, self.sm)
            calls = [runner.prepare(each.experts()) for each in inputs]
            seconds[tile] = median_seconds(calls, REPLAYS)
            runner.close()
        return seconds
