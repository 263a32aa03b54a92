"""Attention's kernels and launches for one kind of GPU.

Where a step has no more tokens than sequences, all are decoded. Otherwise keys and values are written first, sequences
of one token are decoded, and the others prefilled. How many shares a token's keys are cut into falls as the tokens
rise, so that a GPU is full with one token, and never below FEWEST_SHARES: of many sequences the longest would keep the
others waiting. Shares of those are LONG_SHARE tokens or more, so that short sequences are not cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING

from moevlm.plugins.gpu.draft import HOPPER, Draft, KernelSpec
from moevlm.plugins.gpu.ops.paged_heads import PagedHeads
from moevlm.plugins.gpu.program import Argument, Launch, Variant
from moevlm.plugins.gpu.sizes import ONE, SYMBOLS, Count, Linear, at_most, fixed
from moevlm.plugins.gpu.tiles import AttentionTile, attention_tiles
from moevlm.runtime.core.dtypes import DTYPES

if TYPE_CHECKING:
    from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp

MOST_SHARES, FEWEST_SHARES = 64, 8  # of decode
LONG_SHARE = 512
NO_LIMIT = (1 << 31) - 1
WRITE_STEP = 16  # tokens that one program writes
Constants = dict[str, Hashable]


class PagedAttentionDraft:
    """Collects kernels, each once, while the variants are laid out."""

    SUMS, STATES = range(2)  # workspace buffers

    def __init__(self, op: PagedAttentionOp, sm: int) -> None:
        spec = op.spec
        bits = 32 if op.dtype == "float32" else 8 if op.cache else 16
        tiles = attention_tiles(bits, max(op.key_dim, op.value_dim), sm)
        # Keys of a block are of one page.
        self.tile, self.prefill_tile = (
            replace(tile, BN=gcd(tile.BN, op.page_size)) for tile in (tiles.decode, tiles.prefill)
        )
        self.multiprocessors = tiles.multiprocessors
        if op.dtype == "bfloat16" and sm < 80:
            raise ValueError(f"dtype = bfloat16 on sm{sm} (allowed: float16)")
        self.op, self.sm = op, sm
        present = op.has_norms, op.has_sinks, op.has_visible_end
        self.heads = PagedHeads.of(spec, op.key_dim, op.value_dim, op.cache, op.page_size, *present, sm)
        self.kernels: list[KernelSpec] = []
        self.places = {tensor.name: i for i, tensor in enumerate(op.inputs)}

    def draft(self) -> Draft:
        op = self.op
        falling = [(most, shares) for most, shares in _falling(self._shares) if shares >= FEWEST_SHARES]
        least, long = self._least(self._lines(self.tile), self.tile), -(-LONG_SHARE // self.tile.BN)
        decode = [self._decode((at_most(most), _ALL_DECODE), shares, least) for most, shares in falling]
        short = [self._short((at_most(most),), shares, least) for most, shares in _falling(self._prefill_shares)]
        mixed = [self._mixed((at_most(most, "N"),), shares, least) for most, shares in falling]
        decode.append(self._decode((_ALL_DECODE,), FEWEST_SHARES, long))
        mixed.append(self._mixed((), FEWEST_SHARES, long))
        variants = (*decode, *short, *mixed)
        return Draft(op.name, op.inputs, op.outputs, self.sm, tuple(self.kernels), variants)

    def _shares(self, tokens: int) -> int:
        """As many as run at once: more would wait for the first to end, and merge more."""
        return 2 * self.multiprocessors // (tokens * self._slots(self.tile))

    def _prefill_shares(self, tokens: int) -> int:
        """The same for prefill, whose programs have a multiprocessor each."""
        tile = self.prefill_tile
        tiles = tokens // self._tokens(tile) + 1
        return self.multiprocessors // (tiles * self._slots(tile))

    @property
    def _widest(self) -> int:
        """Dimensions of a padded key or value, the larger."""
        return max(self.heads.first + self.heads.rest, self.heads.value_width)

    def _slots(self, tile: AttentionTile) -> int:
        """KV heads times tiles of query heads of each."""
        return self.heads.kv_heads * -(-self.heads.group // self._lines(tile))

    def _lines(self, tile: AttentionTile) -> int:
        """Query heads of a KV head in one tile."""
        return min(self.heads.group, tile.BM)

    def _tokens(self, tile: AttentionTile) -> int:
        return tile.BM // self._lines(tile)

    def _decode(self, bounds: tuple[Linear, ...], shares: int, least: int) -> Variant:
        return self._variant(bounds, "T", shares, (self._decoded("T", shares, least),))

    def _short(self, bounds: tuple[Linear, ...], shares: int, least: int) -> Variant:
        """Of so few tokens that those of prefill, too, have shares."""
        decode = self._decoded("T", shares, least, longest=1)
        return self._variant(bounds, "T", shares, (self._written(), self._prefilled(shares), decode))

    def _mixed(self, bounds: tuple[Linear, ...], shares: int, least: int) -> Variant:
        steps = (self._written(), self._prefilled(1), self._decoded("N", shares, least))
        return self._variant(bounds, "N", shares, steps)

    def _variant(self, bounds: tuple[Linear, ...], places: str, shares: int, steps: tuple[Launch, ...]) -> Variant:
        """The merge follows. Launches overlap with those before them, if the GPU can.

        places: what shares are kept of, tokens, or sequences that have one token.
        """
        merge = self._launch(
            "merge",
            (Count(Linear(**{places: 1})), fixed(self.heads.heads), ONE),
            (self.SUMS, self.STATES, "query_start", "y", "T", ("constant", shares)),
            {"BY_SEQUENCE": places == "N", "SHARES": MOST_SHARES},
        )
        steps = (*steps, merge)
        rows = 4 * shares * self.heads.heads
        buffers = tuple(Count(Linear(**{places: rows * width})) for width in (self.op.value_dim, 2))
        overlap = self.sm >= HOPPER
        return Variant(
            bounds, buffers, tuple(replace(step, overlaps=overlap and i > 0) for i, step in enumerate(steps))
        )

    def _written(self) -> Launch:
        return self._launch(
            "write_pages",
            (Count(Linear(T=1), WRITE_STEP), fixed(self.heads.kv_heads), ONE),
            (*_CACHED, "k_norm", *SYMBOLS),
            {"STEP": WRITE_STEP},
        )

    def _decoded(self, places: str, shares: int, least: int, longest: int = NO_LIMIT) -> Launch:
        """Of each token in a sequence of up to `longest`, or of each sequence that has one token.

        least: blocks of a share.
        """
        tile = self.tile
        limits = ("constant", longest), ("constant", least)
        return self._launch(
            "decode",
            (Count(Linear(**{places: 1})), fixed(self._slots(tile)), fixed(shares)),
            (*_CACHED, "q_norm", "k_norm", "sinks", "visible_end", self.SUMS, self.STATES, *SYMBOLS, *limits),
            {"BY_SEQUENCE": places == "N", "TILE": tile},
            tile,
        )

    def _prefilled(self, shares: int) -> Launch:
        tile, tokens = self.prefill_tile, self._tokens(self.prefill_tile)
        partial = (self.SUMS, self.STATES) if shares > 1 else (None, None)
        return self._launch(
            "prefill",
            # No tile has tokens of two sequences.
            (Count(Linear(T=1, N=tokens), tokens), fixed(self._slots(tile)), fixed(shares)),
            (*_CACHED, "q_norm", "sinks", "visible_end", "y", *partial, *SYMBOLS),
            {"LEAST": self._least(tile.BM, tile), "TILE": tile},
            tile,
        )

    def _least(self, rows: int, tile: AttentionTile) -> int:
        """Blocks of a share. It writes, and the merge reads, sums of rows: no more bytes than its keys and values."""
        op = self.op
        key_bytes = (op.key_dim + op.value_dim * (not op.spec.value_in_key)) * DTYPES[self._cache_dtype].bytes
        return -(-rows * op.value_dim * 2 * 4 // (key_bytes * tile.BN))

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
        if tile:
            constants["INTERPRETED"] = False
        # Wider heads would not fit the registers of four warps where keys are written and shares merged.
        warps, stages = (tile.warps, tile.stages) if tile else (8 if self._widest > 256 else 4, 1)
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
        dtypes = {"value_cache": self._cache_dtype, "visible_end": "int32"}
        return Argument("null"), DTYPES[dtypes.get(argument, "float32")].pointer


def _falling(shares: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """(most tokens, shares), where there are several: a power of two each, of which the next lower is for more."""
    most = 1
    while (now := min(MOST_SHARES, _power_below(shares(most)))) > 1:
        if _power_below(shares(2 * most)) < now:
            yield most, now
        most *= 2


def _power_below(n: int) -> int:
    """The largest power of two up to n; 1 for less."""
    return 1 << max(0, n.bit_length() - 1)


_ALL_DECODE = Linear(T=1, N=-1)
_CACHED = ("qkv", "cos", "sin", "key_cache", "value_cache", "query_start", "context_len", "page_table")
