"""Attention's kernels and launches for one kind of GPU.

Where no step has more tokens than sequences, all are decoded. Otherwise keys and values are written first, sequences of
one token are decoded, and the others prefilled. How many shares a token's keys are cut into falls as the tokens rise,
so that a GPU is full with one token and merges nothing with many.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING

from moevlm.plugins.gpu.draft import HOPPER, Draft, KernelSpec, power_of_two
from moevlm.plugins.gpu.ops.paged_heads import PagedHeads
from moevlm.plugins.gpu.program import (
    ONE,
    SYMBOLS,
    Argument,
    Count,
    Launch,
    Linear,
    Variant,
    at_most,
    fixed,
)
from moevlm.plugins.gpu.tiles import AttentionTile, attention_tiles
from moevlm.runtime.core.dtypes import DTYPES

if TYPE_CHECKING:
    from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp

MOST_SHARES = 64
WRITE_STEP = 16  # tokens that one program writes
Constants = dict[str, Hashable]


class PagedAttentionDraft:
    """Collects kernels, each once, while the variants are laid out."""

    SUMS, STATES = range(2)  # workspace buffers, where there are several shares

    def __init__(self, op: PagedAttentionOp, sm: int) -> None:
        spec = op.spec
        bits = 32 if op.dtype == "float32" else 8 if op.cache else 16
        tiles = attention_tiles(bits, max(op.key_dim, op.value_dim), sm)
        # Keys of a block are of one page.
        self.tile, self.prefill_tile = (
            replace(tile, BN=gcd(tile.BN, op.page_size)) for tile in (tiles.decode, tiles.prefill)
        )
        self.programs = tiles.programs
        if op.dtype == "bfloat16" and sm < 80:
            raise ValueError(f"dtype = bfloat16 on sm{sm} (allowed: float16)")
        self.op, self.sm = op, sm
        self.heads = PagedHeads.of(
            spec, op.key_dim, op.value_dim, op.cache, op.page_size, op.has_norms, op.has_sinks, sm
        )
        self.kernels: list[KernelSpec] = []
        self.places = {tensor.name: i for i, tensor in enumerate(op.inputs)}

    def draft(self) -> Draft:
        op = self.op
        decode, mixed = [], []
        most = 1
        while (shares := self._shares(most)) > 1:
            if self._shares(2 * most) < shares:
                decode.append(self._decode((at_most(most), _ALL_DECODE), shares))
                mixed.append(self._mixed((at_most(most, "N"),), shares))
            most *= 2
        decode.append(self._decode((_ALL_DECODE,), 1))
        mixed.append(self._mixed((), 1))
        return Draft(op.name, op.inputs, op.outputs, self.sm, tuple(self.kernels), (*decode, *mixed))

    def _shares(self, tokens: int) -> int:
        """As many as a GPU has room for at once, a power of two."""
        programs = self.programs // (tokens * self._slots(self.tile))
        return min(MOST_SHARES, power_of_two(programs + 1) // 2 if programs > 1 else 1)

    def _slots(self, tile: AttentionTile) -> int:
        """KV heads times tiles of query heads of each."""
        return self.heads.kv_heads * -(-self.heads.group // self._lines(tile))

    def _lines(self, tile: AttentionTile) -> int:
        """Query heads of a KV head in one tile."""
        return min(self.heads.group, tile.BM)

    def _decode(self, bounds: tuple[Linear, ...], shares: int) -> Variant:
        return self._variant(bounds, "T", shares, self._decoded("T", shares))

    def _mixed(self, bounds: tuple[Linear, ...], shares: int) -> Variant:
        tile = self.prefill_tile
        tokens = tile.BM // self._lines(tile)
        tiles = Count(Linear(T=1, N=tokens), tokens)  # no tile has tokens of two sequences
        write = self._launch(
            "write_pages",
            (Count(Linear(T=1), WRITE_STEP), fixed(self.op.spec.kv_heads), ONE),
            (*_CACHED, "k_norm", *SYMBOLS),
            {"STEP": WRITE_STEP},
        )
        prefill = self._launch(
            "prefill",
            (tiles, fixed(self._slots(tile)), ONE),
            (*_CACHED, "q_norm", "sinks", "y", *SYMBOLS),
            {"TILE": tile, "INTERPRETED": False},
            tile,
        )
        decode, *merge = self._decoded("N", shares)
        return self._variant(bounds, "N", shares, (write, prefill, decode, *merge))

    def _variant(self, bounds: tuple[Linear, ...], places: str, shares: int, steps: tuple[Launch, ...]) -> Variant:
        """Launches overlap with those before them, if the GPU can."""
        can_overlap = self.sm >= HOPPER
        steps = tuple(replace(step, overlaps=can_overlap and i > 0) for i, step in enumerate(steps))
        return Variant(bounds, self._buffers(places, shares), steps)

    def _decoded(self, places: str, shares: int) -> tuple[Launch, ...]:
        """Of each token, or of each sequence that has one token."""
        op, tile = self.op, self.tile
        lines = self._lines(tile)
        # A share writes, and the merge reads, lines * value_dim sums: no more bytes than its keys and values.
        key_bytes = (op.key_dim + op.value_dim * (not op.spec.value_in_key)) * DTYPES[self._cache_dtype].bytes
        least = -(-lines * op.value_dim * 2 * 4 // (key_bytes * tile.BN))
        by_sequence: Constants = {"BY_SEQUENCE": places == "N"}
        buffers = (self.SUMS, self.STATES) if shares > 1 else (None, None)
        grid = Count(Linear(**{places: 1}))
        decode = self._launch(
            "decode",
            (grid, fixed(self._slots(tile)), fixed(shares)),
            (*_CACHED, "q_norm", "k_norm", "sinks", "y", *buffers, *SYMBOLS),
            by_sequence | {"LEAST": least, "TILE": tile, "INTERPRETED": False},
            tile,
        )
        if shares == 1:
            return (decode,)
        merge = self._launch(
            "merge",
            (grid, fixed(op.spec.heads), ONE),
            (self.SUMS, self.STATES, "query_start", "y", "T", ("constant", shares)),
            by_sequence | {"SHARES": MOST_SHARES},
        )
        return decode, merge

    def _buffers(self, places: str, shares: int) -> tuple[Count, ...]:
        if shares == 1:
            return ()
        heads = 4 * shares * self.op.spec.heads
        return tuple(Count(Linear(**{places: heads * width})) for width in (self.op.value_dim, 2))

    @property
    def _cache_dtype(self) -> str:
        return self.op.inputs[self.places["key_cache"]].dtype

    def _launch(
        self,
        function: str,
        grid: tuple[Count, Count, Count],
        arguments: tuple[str | int | tuple[str, int] | None, ...],
        constants: Constants,
        tile: AttentionTile | None = None,
    ) -> Launch:
        """arguments: the name of an input, present or not, of the output or of a symbol; a buffer; a constant."""
        given, types = zip(*map(self._argument, arguments), strict=True)
        constants = {**constants, "H": self.heads, "OVERLAPS": self.sm >= HOPPER}
        warps, stages = (tile.warps, tile.stages) if tile else (4, 1)
        spec = KernelSpec(function, types, tuple(sorted(constants.items())), warps, stages)
        if spec not in self.kernels:
            self.kernels.append(spec)
        return Launch(self.kernels.index(spec), grid, given)

    def _argument(self, argument: str | int | tuple[str, int] | None) -> tuple[Argument, str]:
        if isinstance(argument, tuple):
            return Argument(*argument), "i32"
        if not isinstance(argument, str):
            return (Argument("null") if argument is None else Argument("workspace", argument)), "*fp32"
        if argument in SYMBOLS:
            return Argument("symbol", SYMBOLS.index(argument)), "i32"
        if argument == "y":
            return Argument("output", 0), DTYPES[self.op.dtype].pointer
        if argument in self.places:
            place = self.places[argument]
            return Argument("input", place), DTYPES[self.op.inputs[place].dtype].pointer
        return Argument("null"), DTYPES[self._cache_dtype if argument == "value_cache" else "float32"].pointer


_ALL_DECODE = Linear(T=1, N=-1)
_CACHED = ("qkv", "cos", "sin", "key_cache", "value_cache", "query_start", "context_len", "page_table")
