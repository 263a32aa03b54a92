"""Which tile a kernel works in: measured or estimated, as data in `tiles.json`, so that a GPU's can be tuned alone.

tiles.json: GPUs of like resources -> bits of a weight (32 for any if activations are float32) -> "single" (1 token),
"few" (2 to 8) and "grouped": a list by rising number of rows per expert, the last for all above. Each entry is a tile
for gate_up and one for down. "fp8" stands in the place of "8" for e4m3 weights in groups of 128 where a GPU multiplies
e4m3: there, an entry with "activations": "fp8" quantizes activations, too; BK is 128, BN of gate_up a multiple of it.
On SM90 and up, a grouped entry with "programs": N has as many programs as stay and read weights in their own dtype by
tensor maps. "segments": tiles of attention among patches, by bits of an activation and the most columns that a head is
padded to. "attention": multiprocessors of a GPU, then tiles for "decode", two of which fit a multiprocessor as a rule,
and for "prefill", one of which does, by bits of a cached value and the most dimensions of a head. "delta": tiles of
the gated delta rule by bits of an activation and the most dimensions of a head, see `DeltaTiles`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moevlm.plugins.gpu.draft import ADA

if TYPE_CHECKING:
    from moevlm.plugins.gpu.ops.experts import ExpertsOp

FEW_TOKENS = 8
FAMILIES = {75: "75", 80: "80", 87: "80", 86: "86", 89: "86", 120: "86", 121: "86", 90: "90", 100: "100"}
FAMILIES |= {103: "100", 110: "100"}


@dataclass(frozen=True)
class Tile:
    """BM rows by BN output columns, in steps of BK input columns; a gated gate_up has twice BN."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Range:
    """For up to max_tokens; None: any number.

    activations: "fp8" where they are quantized, "" where not. programs: that stay and take tile after tile, 0 for one
    to each tile.
    """

    max_tokens: int | None
    gate_up: Tile
    down: Tile
    activations: str = ""
    programs: int = 0


@dataclass(frozen=True)
class AttentionTile:
    """BM rows of queries by blocks of BN keys."""

    BM: int
    BN: int
    warps: int
    stages: int


@dataclass(frozen=True)
class AttentionTiles:
    """multiprocessors: of a large GPU of the family."""

    multiprocessors: int
    decode: AttentionTile
    prefill: AttentionTile


@dataclass(frozen=True)
class DeltaTile:
    """BV columns of a head's state to a program."""

    BV: int
    warps: int
    stages: int = 1


@dataclass(frozen=True)
class DeltaTiles:
    """recurrent: for token by token. chunk: tokens of one, 16 or 32. scan: for chunk by chunk.

    few, many: tokens of one convolution's program, in steps of no more tokens than sequences and in others.
    """

    recurrent: DeltaTile
    chunk: int
    chunk_warps: int
    scan: DeltaTile
    few: int
    many: int


def tiles(op: ExpertsOp, sm: int) -> tuple[Range, ...]:
    """By rising max_tokens: first 1 token, then up to FEW_TOKENS, then grouped rows.

    Raises ValueError for an sm that is not known.
    """
    stored = "32" if op.dtype == "float32" else str(op.weight_bits)
    if stored == "8" and op.weights == "fp8" and op.group_size == 128 and sm >= ADA:
        stored = "fp8"
    entry = _family(sm)[stored]
    ranges = [_range(1, entry["single"]), _range(FEW_TOKENS, entry["few"])]
    for rows in entry["grouped"]:
        limit = None if rows["rows"] is None else max(FEW_TOKENS + 1, rows["rows"] * op.experts // op.top_k)
        ranges.append(_range(limit, rows))
    return tuple(ranges)


def segment_tile(bits: int, columns: int, sm: int) -> AttentionTile:
    """bits: of an activation. columns: of a padded head. Raises ValueError for an sm that is not known."""
    by_columns = _family(sm)["segments"][str(bits)]
    return AttentionTile(*next(tile for most, tile in by_columns.items() if columns <= int(most)))


def attention_tiles(bits: int, head_dim: int, sm: int) -> AttentionTiles:
    """bits: of a value in the caches, 32 for any if activations are float32. head_dim: of a key or a value, the larger.

    Raises ValueError for an sm that is not known.
    """
    entry = _family(sm)["attention"]
    by_dim = {name: entry[name][str(bits)] for name in ("decode", "prefill")}
    dim = next((dim for dim in by_dim["decode"] if head_dim <= int(dim)), max(by_dim["decode"], key=int))
    return AttentionTiles(entry["multiprocessors"], *(AttentionTile(*tiles[dim]) for tiles in by_dim.values()))


def delta_tiles(bits: int, head_dim: int, sm: int) -> DeltaTiles:
    """bits: of an activation. head_dim: of a key or a value, the larger. Raises ValueError for an unknown sm."""
    by_dim = _family(sm)["delta"][str(bits)]
    entry = next(entry for most, entry in by_dim.items() if head_dim <= int(most))
    recurrent, scan = DeltaTile(*entry["recurrent"]), DeltaTile(*entry["scan"])
    (chunk, chunk_warps), (few, many) = entry["chunks"], entry["convolve"]
    return DeltaTiles(recurrent, chunk, chunk_warps, scan, few, many)


def _family(sm: int) -> dict[str, Any]:
    if sm not in FAMILIES:
        raise ValueError(f"sm{sm} (allowed: {', '.join(f'sm{known}' for known in sorted(FAMILIES))})")
    found: dict[str, Any] = table()[FAMILIES[sm]]
    return found


@cache
def table() -> dict[str, Any]:
    """tiles.json."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("tiles.json").read_text())
    return data


def _range(max_tokens: int | None, entry: dict[str, Any]) -> Range:
    products = Tile(*entry["gate_up"]), Tile(*entry["down"])
    return Range(max_tokens, *products, entry.get("activations", ""), entry.get("programs", 0))
